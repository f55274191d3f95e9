"""A conflict in a known cell is named. The benchmark does the same with 100 seeds."""

import pytest
from planted import named_first

from qkov_lightning.scores.updates import UpdateDirection


@pytest.mark.parametrize("update", ["adam", "sgd"])
def test_the_predicted_rise_of_the_loss_is_largest_in_the_planted_cell(update: UpdateDirection) -> None:
    assert all(named_first(seed, update) for seed in range(10))
