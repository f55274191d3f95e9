"""Standard errors from leaving samples out."""

from pathlib import Path

import pytest
import torch

from qkov_lightning import GradientCache, Projection, contiguous_heads, head_interference
from qkov_lightning.capture.factors import CapturedStep, GradientFactors
from qkov_lightning.capture.samples import Samples
from qkov_lightning.measure.certainty import jackknife_error
from qkov_lightning.measure.jackknife import jackknife_replicates
from qkov_lightning.scores.scores import SCORES

TASKS = ["code", "math", "code", "math", "math", "code", "code", "math", "math", "code", "code", "math"]
PROJECTION = Projection("attention.q_proj", 0, "attention", "Q", contiguous_heads(2, 3))


def filled_cache(directory: Path) -> tuple[GradientCache, torch.Tensor]:
    """Three records of four samples, and the gradients that they hold."""
    generator = torch.Generator().manual_seed(0)
    cache, gradients = GradientCache(directory), []
    for part in range(3):
        activation = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        grad_output = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        offsets = torch.arange(0, 9, 2)
        names = tuple(TASKS[4 * part : 4 * part + 4])
        samples = Samples(names, tuple(f"{part}.{i}" for i in range(4)))
        factors = {PROJECTION.module_name: GradientFactors(activation, grad_output, offsets)}
        cache.append(0, [CapturedStep(samples, *torch.ones(2, 4, dtype=torch.float64), factors)])
        for i in range(4):
            tokens = slice(2 * i, 2 * i + 2)
            gradients.append((grad_output[tokens].T @ activation[tokens]).reshape(2, -1))
    return cache, torch.stack(gradients)


def test_errors_are_those_of_scores_taken_without_each_group_and_with_the_fisher_of_the_rest(
    tmp_path: Path,
) -> None:
    cache, gradients = filled_cache(tmp_path)
    replicates = jackknife_replicates(cache, [PROJECTION], ["code", "math"], num_groups=3)
    numbers = [TASKS[:i].count(task) * 3 // TASKS.count(task) for i, task in enumerate(TASKS)]
    for score in SCORES:
        left_out = []
        for group in range(3):
            kept = [i for i in range(12) if numbers[i] != group]
            names = [TASKS[i] for i in kept]
            rest = gradients[kept]
            means = [rest[[n == task for n in names]].square().mean(dim=0) for task in ("code", "math")]
            left_out.append(head_interference(rest, names, (means[0] + means[1]) / 2)["code", "math"][score])
        values = torch.stack(left_out)
        expected = ((values - values.mean(dim=0)).square().sum(dim=0) * 2 / 3).sqrt()
        found = replicates[score][:, 0, 1, 0, :, 0]
        torch.testing.assert_close(found, values, rtol=5e-6, atol=0)  # six digits
        # A standard error is made of differences between replicates, which lose a digit or two.
        torch.testing.assert_close(jackknife_error(found), expected, rtol=1e-4, atol=0)


def test_a_replicate_has_six_digits_in_a_file(tmp_path: Path) -> None:
    cache, _ = filled_cache(tmp_path)
    replicates = jackknife_replicates(cache, [PROJECTION], ["code", "math"], num_groups=3)
    for values in replicates.values():
        for value in values[:, :, :, 0, :, 0].flatten().tolist():
            assert value == float(f"{value:.5e}")


def test_appending_to_a_step_adds_to_it(tmp_path: Path) -> None:
    cache, _ = filled_cache(tmp_path)
    assert sum(len(record.samples) for record, _ in cache.records()) == 12


def test_a_cell_that_was_not_measured_has_no_error(tmp_path: Path) -> None:
    cache, _ = filled_cache(tmp_path)
    other = Projection("attention.k_proj", 0, "attention", "K", contiguous_heads(2, 3))
    replicates = jackknife_replicates(cache, [PROJECTION, other], ["code", "math"], num_groups=3)
    assert bool(jackknife_error(replicates["relative"])[..., 1:].isnan().all())


def test_one_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_groups is 1, expected at least 2"):
        jackknife_replicates(GradientCache(tmp_path), [PROJECTION], ["code", "math"], num_groups=1)
