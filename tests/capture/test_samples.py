"""Tasks and sample identifiers from whatever a batch holds."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from qkov_lightning import task
from qkov_lightning.capture.samples import current_labels, label_samples, read_labels


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ("math", "math"),
        (3, "3"),
        (torch.tensor(3), "3"),
        (["math", "code"], ("math", "code")),
        (torch.tensor([0, 2]), ("0", "2")),
        ([torch.tensor(0), torch.tensor(2)], ("0", "2")),
        (("a/b", "💡"), ("a/b", "💡")),
    ],
)
def test_tasks_are_strings_or_ints_for_each_sample_or_for_all(tasks: object, expected: object) -> None:
    assert label_samples(tasks).tasks == expected


@pytest.mark.parametrize("tasks", [0.5, [True, False], torch.rand(3), [None]])
def test_anything_else_is_refused(tasks: object) -> None:
    with pytest.raises(ValueError, match="expected a string or an int"):
        label_samples(tasks)


def test_one_task_stands_for_all_samples_of_the_batch() -> None:
    samples = label_samples("math").resolve(3, Counter())
    assert samples.tasks == ("math",) * 3


def test_samples_without_an_identifier_are_numbered_per_task_and_on() -> None:
    numbering: Counter[str] = Counter()
    labels = label_samples(["math", "code", "math"])
    assert labels.resolve(3, numbering).ids == ("#0", "#0", "#1")
    assert labels.resolve(3, numbering).ids == ("#2", "#1", "#3")


def test_processes_never_give_the_same_number_twice() -> None:
    ids = [label_samples("math").resolve(2, Counter(), rank, 3).ids for rank in range(3)]
    assert len({name for one in ids for name in one}) == 6


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"tasks": ["a", "b"]}, "2 tasks for a batch of 3 samples"),
        ({"tasks": "a", "sample_ids": [1, 2]}, "2 sample ids for a batch of 3 samples"),
        ({"tasks": "a", "num_target_tokens": [1]}, "1 target token counts for a batch of 3 samples"),
    ],
)
def test_labels_that_do_not_fit_the_batch_are_refused(labels: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label_samples(**labels).resolve(3, Counter())


def test_a_batch_is_read_by_key_by_attribute_or_by_function() -> None:
    for batch, source in (
        ({"domain": "math"}, "domain"),
        (SimpleNamespace(domain="math"), "domain"),
        ((1, "math"), lambda batch: batch[1]),
    ):
        assert read_labels(batch, source, "sample_id", "num_target_tokens").tasks == "math"


def test_a_batch_that_is_a_tuple_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"found a tuple\. Add that entry .* `task_of=<key or function"):
        read_labels((1, 2), "task", "sample_id", "num_target_tokens")


def test_the_context_ends_even_after_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), task("math"):
        _ = 1 / 0
    assert current_labels() is None
