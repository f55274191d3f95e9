"""A conflict in a known cell is named, and where there is none nothing is."""

import pytest
from planted import named_first, plant

from qkov_lightning import judge
from qkov_lightning.scores.updates import UpdateDirection


@pytest.mark.parametrize("update", ["adam", "sgd"])
def test_the_predicted_rise_of_the_loss_is_largest_in_the_planted_cell(update: UpdateDirection) -> None:
    assert all(named_first(seed, update) for seed in range(10))


def test_the_verdict_names_the_planted_cell_first_in_100_of_100_seeds() -> None:
    for seed in range(100):
        cell, heatmap = plant(seed, num_samples=192)
        assert judge(heatmap, [("a", "b")]).pairs[0].cells[0].name == cell, seed


def test_without_a_conflict_the_verdict_has_no_sure_harm_in_at_least_95_of_100_seeds() -> None:
    calm = sum(not judge(plant(seed, conflict=False)[1], [("a", "b")]).harmful for seed in range(100))
    assert calm >= 95
