"""Which samples are left out together."""

import pytest
import torch
from torch import Tensor

from qkov_lightning.capture.samples import Samples
from qkov_lightning.measure.certainty import jackknife_error
from qkov_lightning.measure.jackknife import left_out_together, num_groups_of, rounded, unit_numbers

TASKS = ["code", "math", "code", "math", "math", "code", "code", "math", "math", "code", "code", "math"]


def test_neighbours_of_a_task_are_left_out_together() -> None:
    groups = left_out_together(TASKS, [None] * 12, 3).tolist()
    assert groups == [TASKS[:i].count(task) * 3 // 6 for i, task in enumerate(TASKS)]


def test_a_document_is_left_out_as_a_whole() -> None:
    documents = [f"document {i // 2}" for i in range(12)]
    groups = left_out_together(["code"] * 12, documents, 3).tolist()
    assert groups == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


def test_there_are_as_many_groups_as_the_smallest_task_has_documents() -> None:
    some = Samples(("code", "code", "math"), ("a", "b", "c"))
    grouped = Samples(("math", "math"), ("d", "e"), groups=("one", "one"))
    assert num_groups_of([some, grouped]) == 2
    assert num_groups_of([]) == 0


def test_samples_of_one_document_are_one_unit_whatever_their_task() -> None:
    found = unit_numbers(["code", "math", "code", "math"], ["1", "1", "2", "2"], ["x", "x", None, None])
    assert found.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("value", [1.23456789e-12, -98765.4321, 0.0, 3.0])
def test_a_replicate_has_six_digits_in_a_file(value: float) -> None:
    assert float(rounded(torch.tensor(value, dtype=torch.float64))) == float(f"{value:.5e}")


def test_errors_are_those_of_a_mean_for_a_mean() -> None:
    values: Tensor = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    without = (values.sum() - values) / 7
    torch.testing.assert_close(jackknife_error(without), values.std() / 8**0.5)
