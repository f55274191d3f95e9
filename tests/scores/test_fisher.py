"""The EMA of the empirical Fisher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles import online_fisher

from qkov_lightning import CacheError, EmpiricalFisher


def test_the_average_equals_the_online_recursion_per_task() -> None:
    fisher = EmpiricalFisher(decay=0.8)
    steps = [torch.randn(6, 2, 3, dtype=torch.float64) for _ in range(7)]
    for number, step in enumerate(steps):  # task "rare" is absent from the odd steps
        fisher.update(step, ["often"] * 4 + (["rare"] * 2 if number % 2 == 0 else ["often"] * 2))
    often = [step[:4] if number % 2 == 0 else step for number, step in enumerate(steps)]
    torch.testing.assert_close(fisher.estimate("often"), online_fisher(often, 0.8), rtol=1e-12, atol=0)
    rare = [step[4:] for step in steps[::2]]
    torch.testing.assert_close(fisher.estimate("rare"), online_fisher(rare, 0.8), rtol=1e-12, atol=0)


def test_several_steps_at_once_equal_one_after_the_other_in_any_precision_and_shape() -> None:
    """Tasks come and go, the precision changes; a graph of the gradients is not kept."""
    for shape in ((), (3,), (2, 3)):
        single, together = EmpiricalFisher(0.7), EmpiricalFisher(0.7)
        steps = [torch.randn(4, *shape, dtype=torch.float64) for _ in range(6)]
        tasks = [["a"] * 4, ["a", "b"] * 2, ["b"] * 4, ["c", "a", "a", "c"], ["a"] * 4, ["c"] * 4]
        for step, names in zip(steps, tasks, strict=True):
            single.update(step.clone().requires_grad_(), names)
        numbers = [number for number in range(6) for _ in range(4)]
        names = [name for own in tasks for name in own]
        together.fold([torch.cat(steps)], names, numbers)
        late = EmpiricalFisher(0.7)
        late.fold([torch.cat(steps[:3]).float()], names[:12], numbers[:12])
        late.fold([torch.cat(steps)], names, numbers, first_step=3)
        for task in "abc":
            torch.testing.assert_close(together.estimate(task), single.estimate(task), rtol=1e-12, atol=0)
            torch.testing.assert_close(late.estimate(task), single.estimate(task), rtol=1e-6, atol=0)
        assert late.pooled().dtype == torch.float64
        assert not single.pooled().requires_grad


def test_every_task_weighs_the_same_in_the_pool_whatever_its_share() -> None:
    fisher = EmpiricalFisher()
    fisher.update(torch.cat([torch.full((9, 1), 1.0), torch.full((1, 1), 3.0)]), ["often"] * 9 + ["rare"])
    torch.testing.assert_close(fisher.pooled(), torch.tensor([5.0]))  # (1 + 9) / 2


def test_a_saved_average_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    straight, stopped = EmpiricalFisher(), EmpiricalFisher()
    for _ in range(3):
        step = torch.randn(4, 5)
        straight.update(step, ["a/b", "💡", "a/b", "💡"])
        stopped.update(step, ["a/b", "💡", "a/b", "💡"])
        stopped.save(tmp_path / "fisher.safetensors")
        stopped = EmpiricalFisher.load(tmp_path / "fisher.safetensors")
    assert torch.equal(straight.pooled(), stopped.pooled())


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"decay is 1.0, expected 0 <= decay < 1"):
        EmpiricalFisher(decay=1.0)
    with pytest.raises(ValueError, match="3 tasks for 4 samples"):
        EmpiricalFisher().update(torch.randn(4, 5), ["a"] * 3)
    with pytest.raises(ValueError, match="has seen no sample"):
        EmpiricalFisher().pooled()
    with pytest.raises(ValueError, match="No sample of task 'b' was seen; the Fisher knows none"):
        EmpiricalFisher().estimate("b")
    (tmp_path / "bad").write_bytes(b"garbage")
    with pytest.raises(CacheError, match=r"bad cannot be read"):
        EmpiricalFisher.load(tmp_path / "bad")
