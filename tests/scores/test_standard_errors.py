"""Standard errors know that the Fisher varies with the samples, and which samples belong together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qkov_lightning import EmpiricalFisher, HeadInterference, head_interference

TASKS = ["a", "b", "a", "b", "b", "a", "a", "b", "c", "c", "c", "a"]
DAMPING = 1e-3


def gradients(num_samples: int = 12, num_heads: int = 2, num_weights: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, num_heads, num_weights, generator=generator, dtype=torch.float64)
    return x * (1 + torch.arange(num_weights)) * torch.rand(num_samples, 1, 1, generator=generator).exp()


def plain_mean(x: Tensor, tasks: list[str]) -> tuple[Tensor, Tensor]:
    """The Fisher of a probe, and the share of each sample in it."""
    fisher = EmpiricalFisher(decay=0.0)
    fisher.update(x, tasks)
    return fisher.pooled(), fisher.shares(tasks, [0] * len(tasks))


def pair_mean(x: Tensor, tasks: list[str], a: str, b: str, score: str) -> Tensor:
    """Mean of M over pairs, with a loop over the pairs and the Fisher of these samples; per head."""
    fisher = torch.stack([
        x[[t == task for t in tasks]].square().mean(dim=0) for task in sorted(set(tasks))
    ]).mean(dim=0)
    damped = fisher + DAMPING * fisher.mean(dim=-1, keepdim=True)
    pairs = [
        (x[i].square() / damped * x[j].abs()).sum(dim=-1)
        for i in range(len(x)) for j in range(len(x))
        if i != j and tasks[i] == a and tasks[j] == b
    ]  # fmt: skip
    norm = x[[t == b for t in tasks]].abs().sum(dim=-1).mean(dim=0)
    return torch.stack(pairs).mean(dim=0) / (norm if score == "relative" else 1)


@pytest.mark.parametrize("score", ["interference", "relative"])
@pytest.mark.parametrize("pair", [("a", "b"), ("b", "a"), ("a", "c"), ("a", "a"), ("c", "c")])
def test_the_standard_error_is_that_of_leaving_each_sample_out(pair: tuple[str, str], score: str) -> None:
    """Of all tasks, since each of them is in the Fisher: a jackknife by brute force."""
    x = gradients()
    fisher, shares = plain_mean(x, TASKS)
    scores = head_interference(x, TASKS, fisher, DAMPING, fisher_shares=shares)[pair]
    torch.testing.assert_close(scores[score], pair_mean(x, TASKS, *pair, score))
    variance = torch.zeros(2, dtype=torch.float64)
    for task in sorted(set(TASKS)):
        left_out = []
        for n in [n for n, name in enumerate(TASKS) if name == task]:
            rest = [i for i in range(len(TASKS)) if i != n]
            left_out.append(pair_mean(x[rest], [TASKS[i] for i in rest], *pair, score))
        values = torch.stack(left_out)
        variance += (values - values.mean(dim=0)).square().sum(dim=0) * (len(values) - 1) / len(values)
    torch.testing.assert_close(scores[f"{score}_standard_error"], variance.sqrt(), rtol=1e-6, atol=0)


def test_a_known_fisher_gives_other_standard_errors() -> None:
    x = gradients()
    fisher, shares = plain_mean(x, TASKS)
    known = head_interference(x, TASKS, fisher, DAMPING)["a", "b"]
    varying = head_interference(x, TASKS, fisher, DAMPING, fisher_shares=shares)["a", "b"]
    assert torch.equal(known["interference"], varying["interference"])
    error = "interference_standard_error"
    assert bool((known[error] > 1.2 * varying[error]).all())  # numerator and denominator rise together
    nothing = head_interference(x, TASKS, fisher, DAMPING, fisher_shares=torch.zeros(12))["a", "b"]
    torch.testing.assert_close(nothing[error], known[error])


def test_shares_sum_to_one_and_follow_the_decay() -> None:
    x, steps = gradients(), [0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2]
    fisher = EmpiricalFisher(decay=0.5)
    fisher.fold([x], TASKS, steps)
    shares = fisher.shares(TASKS, steps)
    torch.testing.assert_close(shares.sum(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(fisher.pooled(), torch.einsum("i,ihw->hw", shares, x.square()))


def test_samples_of_one_group_count_as_one() -> None:
    """Every sample twice: the errors of half as many samples, if the copies are known as one group."""
    x = gradients()
    twice, tasks = torch.cat([x, x]), TASKS + TASKS
    fisher, _ = plain_mean(x, TASKS)
    groups = torch.arange(12).repeat(2)
    once = head_interference(x, TASKS, fisher, DAMPING)["a", "b"]
    grouped = head_interference(twice, tasks, fisher, DAMPING, groups=groups)["a", "b"]
    alone = head_interference(twice, tasks, fisher, DAMPING)["a", "b"]
    for score in ("interference", "relative", "cosine", "conflict"):
        error = f"{score}_standard_error"
        torch.testing.assert_close(grouped[error], once[error], rtol=1e-9, atol=0)
        assert bool((alone[error] < 0.75 * grouped[error]).all())


def test_a_group_that_spans_two_tasks_varies_together() -> None:
    """B is A with a factor: a ratio of the two hardly varies, and only the groups can know."""
    x = gradients(8)
    both = torch.cat([x, 3 * x])
    tasks = ["a"] * 8 + ["b"] * 8
    fisher, shares = plain_mean(both, tasks)
    groups = torch.arange(8).repeat(2)
    apart = head_interference(both, tasks, fisher, DAMPING, fisher_shares=shares)["a", "b"]
    paired = head_interference(both, tasks, fisher, DAMPING, fisher_shares=shares, groups=groups)["a", "b"]
    assert bool((paired["relative_standard_error"] < 0.7 * apart["relative_standard_error"]).all())


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("replicates", [1, 8])
def test_standard_errors_are_the_spread_over_repeated_runs(heavy: bool, replicates: int) -> None:
    """Taking the Fisher as known made them 1.4 to 3 times too large. 120 runs tell a spread to 7%."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.randn(2, 160, generator=generator).exp()
    mean = 0.3 * torch.randn(2, 2, 160, generator=generator)
    tasks, steps = ["a"] * 48 + ["b"] * 48, [i // 8 for i in range(48)] * 2
    values, errors = [], []
    for _ in range(120):
        z = torch.randn(2, 48, 2, 160, generator=generator)
        if heavy:
            z = z * (0.5 * torch.randn(2, 48, 1, 1, generator=generator)).exp()
        x = ((mean[:, None] + z) * scale).flatten(0, 1)
        fisher = EmpiricalFisher(decay=0.9)
        fisher.fold([x], tasks, steps)
        metric = HeadInterference(["a", "b"], num_layers=1, num_heads=2)
        pooled, weights = fisher.pooled(), None
        if replicates > 1:  # half of the weights stand for all, anew in every run
            drawn = torch.stack([
                torch.randint(0, 160, (replicates, 40), generator=generator) for _ in range(2)
            ])
            index = drawn.flatten(1)
            x = x.gather(2, index.expand(len(x), -1, -1))
            pooled = pooled.gather(1, index)
            weights = torch.full((2, replicates, 40), 160 / (40 * replicates), dtype=torch.float64)
        metric.update(
            x, tasks, pooled, layer=0, block="Q", weights=weights, fisher_shares=fisher.shares(tasks, steps)
        )
        result = metric.compute()
        values.append(torch.stack([result[s][:, :, 0, :, 0] for s in ("interference", "relative")]))
        errors.append(
            torch.stack([result[f"{s}_standard_error"][:, :, 0, :, 0] for s in ("interference", "relative")])
        )
    ratio = torch.stack(errors).square().mean(dim=0).sqrt() / torch.stack(values).std(dim=0)
    assert float(ratio.min()) > 0.8, ratio
    assert float(ratio.max()) < 1.25, ratio
    assert 0.9 < float(ratio.mean()) < 1.1
