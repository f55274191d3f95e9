"""The scores: against naive loops, and the facts that the design rests on."""

from __future__ import annotations

import pytest
import torch
from oracles import (
    naive_conflict,
    naive_cosine,
    naive_curvatures,
    naive_direction,
    naive_interference,
    naive_relative,
    naive_responses,
)
from torch import Tensor

from qkov_lightning import EmpiricalFisher, HeadInterference, ScoreSettings, head_interference
from qkov_lightning.scores import spans
from qkov_lightning.scores.functional import sample_pairs
from qkov_lightning.scores.reduction import slice_statistics
from qkov_lightning.scores.scores import SCORES

EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64 sums in another order
TASKS = ["math"] * 5 + ["code"] * 4 + ["prose"] * 3
DAMPING = 1e-2


def gradients(heads: int = 3, weights: int = 7) -> Tensor:
    """Every head and every task of another size, so that a wrong slice shows."""
    sizes = torch.tensor([1.0, 5.0, 0.2, 1.0, 3.0])[:heads].view(1, -1, 1)
    shift = torch.tensor([0.0] * 5 + [0.5] * 4 + [-0.3] * 3).view(-1, 1, 1)
    return sizes * (torch.randn(12, heads, weights, dtype=torch.float64) + shift)


def pooled(samples: Tensor) -> Tensor:
    fisher = EmpiricalFisher(decay=0.0)
    fisher.update(samples, TASKS)
    return fisher.pooled()


def rows(name: str) -> list[int]:
    return [index for index, task in enumerate(TASKS) if task == name]


def test_scores_equal_a_naive_loop_over_pairs_and_weights() -> None:
    samples = gradients()
    fisher = pooled(samples)
    scores = head_interference(samples, TASKS, fisher, DAMPING)
    for a, b in scores:
        for head in range(3):
            one, other, norm = samples[rows(a), head], samples[rows(b), head], fisher[head]
            same = a == b
            naive = naive_interference(one, other, norm, DAMPING, same).nanmean()
            torch.testing.assert_close(scores[a, b]["interference"][head], naive, **EXACT)
            assert scores[a, b]["relative"][head] == pytest.approx(
                naive_relative(one, other, norm, DAMPING, same), rel=1e-10
            )
            assert scores[a, b]["cosine"][head] == pytest.approx(naive_cosine(one, other, same), rel=1e-9)


RATES = torch.linspace(0.1, 2.0, 7, dtype=torch.float64)


@pytest.mark.parametrize("update", ["adam", "sgd", RATES], ids=["adam", "sgd", "state"])
def test_scores_of_the_update_equal_a_naive_loop_over_samples_and_weights(update: str | Tensor) -> None:
    samples = gradients()
    fisher = pooled(samples)
    rates = update.expand(3, 7) if isinstance(update, Tensor) else update
    num_terms = torch.arange(1.0, len(TASKS) + 1).double()
    scores = head_interference(samples, TASKS, fisher, DAMPING, rates, 0.3, num_terms=num_terms)
    for a, b in scores:
        for head in range(3):
            one, other = samples[rows(a), head], samples[rows(b), head]
            responses = naive_responses(one, other, DAMPING, update, a == b)
            terms = [float(num_terms[row]) for row in rows(a)]
            curvatures = naive_curvatures(one, other, DAMPING, update, a == b)
            curvature = sum(t * c for t, c in zip(terms, curvatures, strict=True)) / len(terms)
            rise = -0.3 * sum(responses) / len(responses) + 0.3**2 / 2 * curvature
            assert scores[a, b]["forgetting"][head] == pytest.approx(curvature, rel=1e-9)
            assert scores[a, b]["loss_rise"][head] == pytest.approx(rise, rel=1e-9)
            gain = 0.3 * float(naive_direction(other, DAMPING, update) @ other.mean(dim=0))
            assert scores[a, b]["exchange"][head] == pytest.approx(rise / gain, rel=1e-9)
            whitened = naive_conflict(one, other, fisher[head], DAMPING, a == b)
            assert scores[a, b]["conflict"][head] == pytest.approx(whitened, rel=1e-9)


def test_the_predicted_rise_of_the_loss_is_what_a_quadratic_loss_does() -> None:
    """Samples with the loss -log N(y; <w, x>, 1): for these the empirical Fisher at the truth is the Hessian.

    The step is small, so that the two agree to the sampling error of the Fisher, 1 / sqrt(4000) of the rise.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8000, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, generator=generator, dtype=torch.float64)
    target = inputs @ weight + torch.randn(8000, generator=generator, dtype=torch.float64)
    target[4000:] += 0.5 * inputs[4000:, 0]  # task B wants another weight
    samples = ((inputs @ weight - target)[:, None] * inputs)[:, None]
    tasks = ["a"] * 4000 + ["b"] * 4000

    def loss(w: Tensor) -> Tensor:
        return (inputs[:4000] @ w - target[:4000]).square().mean() / 2

    step = 0.4
    moved = weight - step * samples[4000:, 0].mean(dim=0)
    fisher = samples.square().mean(dim=0)
    scores = head_interference(samples, tasks, fisher, update="sgd", step_size=step)["a", "b"]
    rise, error = scores["loss_rise"].item(), scores["loss_rise_standard_error"].item()
    assert rise == pytest.approx((loss(moved) - loss(weight)).item(), rel=0.05)
    assert error < rise / 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 16])
def test_one_sample_that_has_all_the_gradient_leaves_no_score_without_a_value(
    count: int, ratio: float, dtype: torch.dtype
) -> None:
    """Without it the others' mean square is what rounding leaves, or nothing.

    Their direction then is none.
    """
    tasks = ["a"] * count + ["b"] * 4
    size = torch.cat([torch.ones(1), torch.full((count - 1,), ratio), torch.ones(4)])
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        samples = (torch.randn(count + 4, 2, 30, generator=generator) * size[:, None, None]).to(dtype)
        fisher = samples.square().mean(dim=0)
        scores = head_interference(samples, tasks, fisher)
        for pair in scores:
            for score in ("forgetting", "loss_rise"):
                assert scores[pair][score].isfinite().all(), (pair, score)
                assert scores[pair][f"{score}_standard_error"].isfinite().all(), (pair, score)
        if ratio == 0:
            # Either the sample meets the direction of the others, which is none, or the others have no
            # gradient.
            assert (scores["a", "a"]["forgetting"] == 0).all()


def test_tasks_that_want_opposite_weights_conflict_and_tasks_that_want_the_same_gain() -> None:
    shared = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    noise = 0.3 * torch.randn(20, 1, 3, dtype=torch.float64)
    for sign in (1.0, -1.0):
        signs = torch.tensor([1.0] * 10 + [sign] * 10, dtype=torch.float64)[:, None, None]
        samples = signs * shared + noise
        scores = head_interference(samples, ["a"] * 10 + ["b"] * 10, samples.square().mean(dim=0))["a", "b"]
        assert scores["conflict"].item() * sign > 0.9
        assert scores["loss_rise"].item() * sign < 0


def test_pair_matrices_equal_the_naive_loop() -> None:
    samples = gradients(heads=1)[:, 0]
    fisher = pooled(samples)
    naive = naive_interference(samples[rows("math")], samples[rows("code")], fisher, DAMPING, same=False)
    torch.testing.assert_close(
        sample_pairs(samples[rows("math")], samples[rows("code")], fisher, DAMPING), naive, **EXACT
    )


def test_the_heatmap_changes_when_the_reference_samples_change() -> None:
    """Divided by task A's own Fisher, A cancels: the heatmap would only show the gradient norm of B."""
    samples = gradients()
    changed = samples.clone()
    changed[rows("math")] = changed[rows("math")].flip(-1) * torch.linspace(0.1, 2, 7)
    own, own_changed = (x[rows("math")].square().mean(0) for x in (samples, changed))

    def score(x: Tensor, fisher: Tensor) -> Tensor:
        return head_interference(x, TASKS, fisher, 1e-12)["math", "code"]["interference"]

    torch.testing.assert_close(
        score(samples, own), score(changed, own_changed), rtol=1e-8, atol=0
    )  # the defect
    assert not torch.allclose(score(samples, pooled(samples)), score(changed, pooled(changed)), rtol=0.05)


def test_relative_averages_to_one_over_the_tasks_and_never_exceeds_their_number() -> None:
    samples = gradients()
    scores = head_interference(samples, TASKS, pooled(samples), 1e-12)
    for b in ("math", "code", "prose"):
        others = torch.stack([scores[a, b]["relative"] for a in ("math", "code", "prose") if a != b])
        assert (others >= 0).all()
        assert (others <= 3).all()
        # Within the task itself the pairs (i, i) are left out: put them back for the identity.
        fisher, own = pooled(samples), samples[rows(b)]
        with_self = (own.square().mean(0) / fisher * own.abs().mean(0)).sum(-1) / own.abs().mean(0).sum(-1)
        torch.testing.assert_close(
            (others.sum(0) + with_self) / 3, torch.ones(3, dtype=torch.float64), **EXACT
        )


@pytest.mark.parametrize("factor", [1e-3, 1e4])
def test_rescaling_the_loss_rescales_interference_and_leaves_the_dimensionless_scores(factor: float) -> None:
    samples = gradients()
    before = head_interference(samples, TASKS, pooled(samples))["math", "code"]
    after = head_interference(factor * samples, TASKS, pooled(factor * samples))["math", "code"]
    for name, value in before.items():
        # Per unit of weight; with Adam's direction, which has no units.
        power = {"interference": 1, "forgetting": 2}.get(name.removesuffix("_standard_error"), 0)
        if name.startswith(("loss_rise", "exchange")):
            continue
        expected = value * factor**power
        torch.testing.assert_close(after[name], expected, rtol=1e-9, atol=0)


def test_the_order_of_samples_and_weights_does_not_matter() -> None:
    samples = gradients()
    order = torch.randperm(12)
    weights = torch.randperm(7)
    before = head_interference(samples, TASKS, pooled(samples), groups=torch.arange(12))
    shuffled, tasks = samples[order][:, :, weights], [TASKS[i] for i in order]
    after = head_interference(shuffled, tasks, pooled(samples)[:, weights], groups=order)
    for pair, scores in before.items():
        for name, value in scores.items():
            torch.testing.assert_close(after[pair][name], value, rtol=1e-9, atol=1e-12)


def test_heads_add_up_to_the_unsliced_block() -> None:
    """With one damping for the block, the sum over heads is the score of all its weights."""
    samples = gradients()
    fisher = pooled(samples)
    whole = head_interference(samples.flatten(1)[:, None], TASKS, fisher.flatten()[None], 1e-13)[
        "math", "code"
    ]
    heads = head_interference(samples, TASKS, fisher, 1e-13)["math", "code"]
    torch.testing.assert_close(heads["interference"].sum(), whole["interference"][0], rtol=1e-9, atol=0)


def test_within_a_task_no_sample_is_paired_with_itself() -> None:
    """Samples that touch different weights do not interfere, however large each one is."""
    samples = torch.eye(4, dtype=torch.float64)[:, None] * 10
    scores = head_interference(samples, ["math"] * 4, torch.ones(1, 4, dtype=torch.float64))["math", "math"]
    assert scores["interference"].item() == pytest.approx(0, abs=1e-12)
    assert scores["cosine"].item() == pytest.approx(0, abs=1e-12)


def test_a_task_with_fewer_than_two_samples_has_no_data() -> None:
    samples = gradients()
    tasks = ["math"] * 11 + ["code"]
    scores = head_interference(samples, tasks, pooled(samples))
    assert not scores["math", "math"]["interference"].isnan().any()
    for pair in (("math", "code"), ("code", "math"), ("code", "code")):
        assert all(value.isnan().all() for value in scores[pair].values())


@pytest.mark.parametrize("score", list(SCORES))
def test_standard_errors_agree_with_repeated_sampling(score: str) -> None:
    """1,000 experiments (as heads) of 40 samples a task: the standard error is the spread of the values.

    The spread of 1,000 draws is known to 2%; the first-order formula of a ratio adds a few percent more. Of a
    product of two noisy directions it counts the noise of both twice.
    """
    tolerance = 0.2 if score == "forgetting" else 0.1
    tasks = ["math"] * 40 + ["code"] * 40
    size = torch.tensor([1.0, 2.0, 0.5, 1.5, 1.0, 0.3], dtype=torch.float64)
    shift = torch.stack([
        torch.tensor([0.8, -0.8, 0.8, 0.8, 0.8, 0.8]),
        torch.tensor([0.5, 0.5, -0.9, 0.2, 0.5, 0.0]),
    ])
    samples = (torch.randn(80, 1000, 6, dtype=torch.float64) + shift.repeat_interleave(40, 0)[:, None]) * size
    fisher = samples.square().mean(dim=(0, 1)).expand(1000, 6)
    results = head_interference(samples, tasks, fisher)
    # Within a task, what is gained and the rise are almost the same number: their ratio has no first order.
    within = [] if score == "exchange" else [("math", "math")]
    for pair in (("math", "code"), ("code", "math"), *within):
        values, errors = results[pair][score], results[pair][f"{score}_standard_error"]
        assert errors.square().mean().sqrt().item() == pytest.approx(values.std().item(), rel=tolerance), pair


@pytest.mark.parametrize("update", ["adam", "sgd", "rates"])
@pytest.mark.parametrize(
    ("span_bytes", "min_weights"),
    [(1, 1), (1, 3), (12 * 14 * 8, 1)],
    ids=["1 weight", "3 weights", "2 heads"],
)
def test_blocks_and_spans_of_weights_give_the_same_as_one_tensor(
    monkeypatch: pytest.MonkeyPatch, span_bytes: int, min_weights: int, update: str
) -> None:
    samples = gradients()
    indices = torch.tensor([0, 1, 1, -1, 0, 0, 1, -1, 0, 1, -1, 0])
    fisher = pooled(samples)
    rule = torch.rand(fisher.shape, dtype=torch.float64) if update == "rates" else update
    whole = slice_statistics([samples], indices, 2, fisher, DAMPING, rule)
    monkeypatch.setattr(spans, "SPAN_BYTES", span_bytes)
    monkeypatch.setattr(spans, "MIN_WEIGHTS", min_weights)
    blocks = list(samples.split([1, 4, 2], dim=2))
    parts = slice_statistics(blocks, indices, 2, fisher, DAMPING, rule)
    for name, value in vars(whole).items():
        torch.testing.assert_close(getattr(parts, name), value, **EXACT)


def test_the_metric_agrees_with_the_function_and_sums_over_processes() -> None:
    samples = gradients()
    fisher = pooled(samples)
    names = ["code", "math", "prose"]
    expected = head_interference(samples, TASKS, fisher, DAMPING)
    metrics = [HeadInterference(names, 2, 4, ScoreSettings(damping=DAMPING)) for _ in range(2)]
    metrics[0].update(samples, TASKS, fisher, layer=0, block="Q")
    metrics[1].update(samples[:, :2], TASKS, fisher[:2], layer=1, block="O")
    for name in metrics[0]._defaults:  # what dist_reduce_fx="sum" does
        setattr(metrics[0], name, getattr(metrics[0], name) + getattr(metrics[1], name))
    result = metrics[0].compute()
    for (a, b), scores in expected.items():
        at = (names.index(a), names.index(b))
        for name, value in scores.items():
            torch.testing.assert_close(result[name][at][0, :3, 0], value, **EXACT)
            torch.testing.assert_close(result[name][at][1, :2, 3], value[:2], **EXACT)
            assert result[name][at][0, 3].isnan().all(), "a head that does not exist has no data"
            assert result[name][at][1, :, :3].isnan().all(), "a block that was not measured has no data"
    assert result["num_samples"][:, 0, 0, 0].tolist() == [4, 5, 3]


def test_a_slice_with_a_score_of_zero_over_zero_is_no_data_not_zero() -> None:
    metric = HeadInterference(["math", "code"], 1, 1)
    metric.update(
        torch.zeros(4, 1, 3), ["math", "math", "code", "code"], torch.zeros(1, 3), layer=0, block="Q"
    )
    assert metric.compute()["interference"][0, 1, 0, 0, 0].isnan()


def test_the_metric_refuses_what_does_not_fit() -> None:
    metric = HeadInterference(["math", "code"], num_layers=1, num_heads=2)
    samples, fisher = torch.randn(4, 2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match="Unknown task 'poetry': the metric was made for math, code"):
        metric.update(samples, ["math", "poetry", "math", "code"], fisher, layer=0, block="Q")
    with pytest.raises(
        ValueError, match="layer 1, heads 0 to 1: the metric was made for 1 layers and 2 heads"
    ):
        metric.update(samples, ["math"] * 4, fisher, layer=1, block="Q")
    with pytest.raises(ValueError, match="3 tasks for gradients of 4 samples"):
        metric.update(samples, ["math"] * 3, fisher, layer=0, block="Q")
    with pytest.raises(ValueError, match="Gradients of 2 weights a head, but a Fisher of 3"):
        metric.update([samples[..., :2]], ["math"] * 4, fisher, layer=0, block="Q")
    with pytest.raises(ValueError, match=r"damping is 0\.0"):
        head_interference(samples, ["math"] * 4, fisher, damping=0.0)
    with pytest.raises(ValueError, match="tasks is empty"):
        HeadInterference([], 1, 1)
