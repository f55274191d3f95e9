"""What the drift check promises."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scipy import stats

from qkov_lightning import InterferenceHeatmap, NotComparableError, check_drift, head_interference
from qkov_lightning.heads.projections import BLOCKS
from qkov_lightning.measure.cells import BlockInfo, Layer

TASKS = ("code", "math", "prose")
LAYERS, HEADS = 2, 4


def make_heatmap(error: float = 0.05, samples: int = 64, tasks: tuple = TASKS) -> InterferenceHeatmap:
    """Every cell has a value of its own; K and V have half of the heads."""
    shape = (len(tasks), len(tasks), LAYERS, HEADS, len(BLOCKS))
    generator = torch.Generator().manual_seed(1)
    exists = torch.ones(LAYERS, HEADS, 4, dtype=torch.bool)
    exists[:, HEADS // 2 :, 1:3] = False
    relative = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
    cosine = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    cosine = (cosine + cosine.transpose(0, 1)) / 2
    blocks = {
        block: BlockInfo(f"{block}_proj", HEADS // 2 if block in "KV" else HEADS, 2 if block in "KV" else 1, "measured")
        for block in BLOCKS
    }  # fmt: skip
    scores = {
        "loss_rise": relative - 1,
        "interference": relative * 7,
        "relative": relative,
        "cosine": cosine,
    }
    scores = {name: values.masked_fill(~exists, math.nan) for name, values in scores.items()}
    errors = {
        name: torch.full(shape, error, dtype=torch.float64).masked_fill(~exists, math.nan) for name in scores
    }
    num_samples = torch.full((len(tasks), *shape[2:]), float(samples), dtype=torch.float64) * exists
    return InterferenceHeatmap(
        tasks, tuple(Layer(f"layers.{i}", blocks) for i in range(LAYERS)), scores, errors, num_samples
    )


def changed(heatmap: InterferenceHeatmap, score: str, at: tuple, by: float) -> InterferenceHeatmap:
    values = heatmap.scores[score].clone()
    values[at] += by
    return replace(heatmap, scores={**heatmap.scores, score: values})


def test_a_heatmap_never_drifts_from_itself() -> None:
    for error in (0.0, 0.05, 3.0):
        heatmap = make_heatmap(error)
        report = check_drift(heatmap, heatmap, tolerance=0.0, alpha=0.49)
        assert not report.drifted
        assert report.findings == ()


def test_a_cell_that_rose_beyond_noise_is_named_first() -> None:
    baseline = make_heatmap()
    report = check_drift(baseline, changed(baseline, "relative", (0, 1, 1, 3, 3), 0.9))
    assert report.drifted
    first = report.findings[0]
    assert (first.kind, first.score, first.task_a, first.task_b, first.name) == (
        "cell",
        "relative",
        "code",
        "math",
        "L1.H3.O",
    )
    assert first.layer_name == "layers.1"
    assert first.rise == pytest.approx(0.9)
    assert [cell.name for cell in report.cells] == ["L1.H3.O"]


def test_a_cosine_that_fell_is_drift_and_one_that_rose_is_not() -> None:
    baseline = make_heatmap()
    both = changed(baseline, "cosine", (0, 2, 0, 1, 0), -0.7)
    both = changed(both, "cosine", (2, 0, 0, 1, 0), -0.7)
    report = check_drift(baseline, both)
    # Once, although the cosine of (code, prose) is that of (prose, code).
    assert [(cell.task_a, cell.task_b, cell.name) for cell in report.cells] == [("code", "prose", "L0.H1.Q")]
    assert report.cells[0].rise == pytest.approx(0.7)
    assert not check_drift(baseline, changed(baseline, "cosine", (0, 2, 0, 1, 0), 0.7)).drifted


def test_less_interference_is_no_drift() -> None:
    baseline = make_heatmap()
    lower = changed(baseline, "relative", (slice(None),), -0.4)
    assert not check_drift(baseline, lower).drifted


def test_the_within_task_control_is_not_judged() -> None:
    baseline = make_heatmap()
    assert not check_drift(baseline, changed(baseline, "relative", (0, 0), 5.0)).drifted


def test_a_looser_tolerance_never_turns_a_pass_into_a_failure() -> None:
    baseline = make_heatmap()
    generator = torch.Generator().manual_seed(2)
    current = baseline
    for score in ("relative", "cosine"):
        noise = torch.randn(baseline.scores[score].shape, generator=generator, dtype=torch.float64)
        current = replace(current, scores={**current.scores, score: baseline.scores[score] + 0.3 * noise})
    drifted = [
        {(f.kind, f.score, f.task_a, f.task_b, f.name) for f in check_drift(baseline, current, tolerance=t).findings}
        for t in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 2.0)
    ]  # fmt: skip
    assert drifted[0]
    assert not drifted[-1]
    for tighter, looser in itertools.pairwise(drifted):
        assert looser <= tighter


def test_the_order_of_the_cells_does_not_matter() -> None:
    baseline = make_heatmap()
    current = changed(baseline, "relative", (2, 1, 0, 0, 3), 0.6)
    current = changed(current, "relative", (0, 1, 1, 3, 0), 0.5)
    expected = check_drift(baseline, current)
    assert len(expected.cells) == 2

    order = torch.tensor([3, 1, 2, 0])  # query heads only: K and V have two
    flipped = []
    for heatmap in (baseline, current):
        parts = {}
        for what in ("scores", "standard_errors"):
            parts[what] = {name: values.flip(2) for name, values in getattr(heatmap, what).items()}
            for values in parts[what].values():
                for block in (0, 3):
                    values[..., block] = values[..., order, block]
        flipped.append(replace(heatmap, layers=heatmap.layers[::-1], **parts))
    report = check_drift(*flipped)
    assert [cell.p_value for cell in report.cells] == [cell.p_value for cell in expected.cells]
    assert {cell.name for cell in report.cells} == {"L1.H3.O", "L0.H0.Q"}


def test_tasks_are_matched_by_name() -> None:
    baseline = make_heatmap()
    current = changed(baseline, "relative", (0, 1, 1, 3, 3), 0.9)
    order = [2, 0, 1]
    shuffled = replace(
        current,
        tasks=tuple(TASKS[i] for i in order),
        scores={name: values[order][:, order] for name, values in current.scores.items()},
        standard_errors={name: values[order][:, order] for name, values in current.standard_errors.items()},
        num_samples=current.num_samples[order],
    )
    assert check_drift(baseline, shuffled).findings == check_drift(baseline, current).findings


def test_p_values_are_those_of_student_and_benjamini_hochberg() -> None:
    """One cell against 2 ranks of others: computed here by hand."""
    baseline = make_heatmap(error=0.1, samples=20)
    current = changed(baseline, "relative", (0, 1, 1, 3, 3), 1.0)
    report = check_drift(baseline, current, scores=["relative"], tolerance=0.0)
    raw = stats.t.sf(1.0 / math.hypot(0.1, 0.1), df=19)
    pairs, cells = 6, LAYERS * (2 * HEADS + HEADS)
    assert report.num_tests == pairs * (cells + 4 + 1)
    assert report.cells[0].p_value == pytest.approx(raw * report.num_tests, rel=1e-9)
    level = 0.05 * len(report.findings) / report.num_tests
    bound = 1.0 - stats.t.isf(level, df=19) * math.hypot(0.1, 0.1)
    assert report.cells[0].lower_bound == pytest.approx(bound, rel=1e-9)


def test_the_lower_bound_exceeds_the_tolerance_exactly_where_there_is_drift() -> None:
    baseline = make_heatmap()
    current = changed(baseline, "relative", (0, 1), torch.linspace(0, 0.8, HEADS).view(1, HEADS, 1))
    report = check_drift(baseline, current, tolerance=0.05)
    assert report.findings
    assert all(finding.lower_bound > 0.05 for finding in report.findings)
    assert all(finding.lower_bound <= 0.05 for finding in report.nearest)


def test_a_rise_spread_over_a_block_shows_in_its_mean() -> None:
    baseline = make_heatmap(error=0.02)
    values = baseline.scores["relative"].clone()
    values[1, 0, :, :, 0] += 0.2
    report = check_drift(baseline, replace(baseline, scores={**baseline.scores, "relative": values}))
    (mean,) = (finding for finding in report.findings if finding.kind == "block mean")
    assert (mean.name, mean.task_a, mean.task_b) == ("mean of Q", "math", "code")
    assert mean.rise == pytest.approx(0.2)
    assert (mean.layer, mean.head) == (None, None)
    # The standard errors of cells that may vary together add up, they do not average out.
    assert mean.standard_error == pytest.approx(math.hypot(0.02, 0.02))


def test_a_maximum_that_rose_is_judged_against_the_maximum_before() -> None:
    baseline = make_heatmap(error=0.02)
    report = check_drift(baseline, changed(baseline, "relative", (0, 1, 1, 3, 3), 2.0))
    (maximum,) = (finding for finding in report.findings if finding.kind == "maximum")
    assert maximum.name == "maximum (L1.H3.O)"
    assert maximum.baseline == float(baseline.values("code", "math", "relative").nan_to_num().max())


def test_noise_of_the_size_of_the_standard_errors_is_no_drift() -> None:
    generator = torch.Generator().manual_seed(3)
    alarms = 0
    for _ in range(100):
        pair = []
        for _ in range(2):
            heatmap = make_heatmap()
            scores = {
                name: values + 0.05 * torch.randn(values.shape, generator=generator, dtype=torch.float64)
                for name, values in heatmap.scores.items()
            }
            pair.append(replace(heatmap, scores=scores))
        alarms += check_drift(*pair, tolerance=0.0).drifted
    assert alarms <= 11  # 5 expected; more than 11 has a chance of 0.4%


def heavy_tailed(generator: torch.Generator, means: torch.Tensor, num_samples: int) -> dict:
    """Scores of fresh per-sample gradients whose scale varies tenfold, the same in all heads."""
    gradients = []
    for mean in means:
        scale = torch.randn(num_samples, 1, 1, generator=generator).exp()
        noise = torch.randn(num_samples, *mean.shape, generator=generator)
        gradients.append((0.3 * mean + noise * mean.abs()) * scale)
    fisher = torch.stack([one.square().mean(dim=0) for one in gradients]).mean(dim=0)
    tasks = ["code"] * num_samples + ["math"] * num_samples
    return head_interference(torch.cat(gradients), tasks, fisher)


def test_false_alarms_stay_at_the_nominal_rate_for_heavy_tailed_gradients() -> None:
    """Through the scores and their own standard errors, with cells that vary together."""
    generator = torch.Generator().manual_seed(4)
    means = torch.randn(2, HEADS, 48, generator=generator)
    blocks = {block: BlockInfo(block, HEADS, 1, "measured") for block in BLOCKS}
    alarms = 0
    for _ in range(100):
        pair = []
        for _ in range(2):
            maps = [heavy_tailed(generator, means, 24) for _ in BLOCKS]
            shape = (2, 2, 1, HEADS, 4)
            scores, errors = {}, {}
            for name in ("loss_rise", "relative", "cosine"):
                for target, key in ((scores, name), (errors, f"{name}_standard_error")):
                    target[name] = torch.stack(
                        [torch.stack([one[a, b][key] for a in ("code", "math") for b in ("code", "math")]) for one in maps],
                        dim=-1,
                    ).view(shape)  # fmt: skip
            num_samples = torch.full((2, 1, HEADS, 4), 24.0, dtype=torch.float64)
            layers = (Layer("attention", blocks),)
            pair.append(InterferenceHeatmap(("code", "math"), layers, scores, errors, num_samples))
        alarms += check_drift(*pair, tolerance=0.0).drifted
    assert alarms <= 11


def test_missing_data_is_never_no_drift() -> None:
    baseline = make_heatmap()
    hole = changed(baseline, "relative", (0, 1, 1, 3, 3), math.nan)
    for pair in ((baseline, hole), (hole, baseline), (hole, hole)):
        with pytest.raises(
            NotComparableError, match=r"no data for 'relative' in 1 of .*code x math, L1\.H3\.O"
        ):
            check_drift(*pair)
    infinite = changed(baseline, "cosine", (1, 2, 0, 0, 0), math.inf)
    with pytest.raises(NotComparableError, match="The current heatmap has no data for 'cosine'"):
        check_drift(baseline, infinite)
    errors = {name: values.clone() for name, values in baseline.standard_errors.items()}
    errors["relative"][0, 1, 0, 0, 0] = math.nan
    with pytest.raises(NotComparableError, match="The baseline has no data for 'relative'"):
        check_drift(replace(baseline, standard_errors=errors), baseline)


def test_a_frozen_block_needs_no_data_but_must_be_frozen_in_both() -> None:
    def freeze(heatmap: InterferenceHeatmap) -> InterferenceHeatmap:
        blocks = dict(heatmap.layers[0].blocks)
        blocks["V"] = replace(blocks["V"], status="frozen")
        frozen = changed(heatmap, "relative", (slice(None), slice(None), 0, slice(None), 2), math.nan)
        return replace(frozen, layers=(Layer(heatmap.layers[0].name, blocks), *heatmap.layers[1:]))

    baseline = make_heatmap()
    assert not check_drift(freeze(baseline), freeze(baseline)).drifted
    with pytest.raises(NotComparableError, match=r"Layer 0 differs: .*V: 2 heads in groups of 2, frozen"):
        check_drift(baseline, freeze(baseline))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda h: make_heatmap(tasks=("code", "math")), "has the tasks code, math, prose, .* code, math.*same tasks"),
        (lambda h: replace(h, layers=h.layers[:1]), "2 attention layers, the current heatmap 1"),
        (lambda h: replace(h, layers=(h.layers[0], Layer("encoder.1", h.layers[1].blocks))), "Layer 1 differs.*encoder.1"),
        (lambda h: replace(h, scores={"loss_rise": h.scores["loss_rise"]}), "current heatmap has no score 'relative'"),
        (lambda h: make_heatmap(samples=15), "64 samples in the baseline and 15 in the current.*at least 16"),
        (lambda h: replace(h, notes={"fisher": "probe mean"}), "fisher = None, the current heatmap with 'probe mean'"),
        (lambda h: replace(h, notes={"damping": 0.1}), "damping = None"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(other: Callable, message: str) -> None:
    baseline = make_heatmap()
    with pytest.raises(NotComparableError, match=message):
        check_drift(baseline, other(baseline))


def test_exact_and_linear_replicates_are_not_compared_group_by_group() -> None:
    """A heatmap that does not say which it has is an older one, whose replicates are exact."""
    values = {name: torch.stack([score, score + 1.0]) for name, score in make_heatmap().scores.items()}
    old = replace(make_heatmap(), replicates=values)
    exact, linear = (replace(old, notes={"replicates": kind}) for kind in ("exact", "linear"))
    assert not check_drift(old, exact).drifted
    with pytest.raises(
        NotComparableError, match=r"with exact replicates, .* linear ones.* replicates='exact'"
    ):
        check_drift(exact, linear)


def test_one_task_cannot_interfere() -> None:
    heatmap = make_heatmap(tasks=("code",))
    with pytest.raises(NotComparableError, match="needs at least two"):
        check_drift(heatmap, heatmap)


@pytest.mark.parametrize(
    "wrong",
    [{"tolerance": -0.1}, {"tolerance": math.nan}, {"alpha": 0.5}, {"alpha": 0.0}, {"min_samples": 1}, {"scores": ()}],
)  # fmt: skip
def test_wrong_settings_are_refused(wrong: dict) -> None:
    heatmap = make_heatmap()
    with pytest.raises(ValueError, match=r"expected tolerance >= 0, 0 < alpha < 0\.5"):
        check_drift(heatmap, heatmap, **wrong)


def test_a_heatmap_can_say_that_its_standard_errors_have_fewer_degrees_of_freedom() -> None:
    baseline = make_heatmap(error=0.1)
    current = changed(baseline, "relative", (0, 1, 1, 3, 3), 1.0)
    current = replace(current, notes={"degrees_of_freedom": 7})
    report = check_drift(baseline, current, scores=["relative"], tolerance=0.0, alpha=0.4)
    raw = stats.t.sf(1.0 / math.hypot(0.1, 0.1), df=7)
    surest = (*report.findings, *report.nearest)[0]
    assert surest.p_value == pytest.approx(raw * report.num_tests, rel=1e-9)


def with_replicates(heatmap: InterferenceHeatmap, noise: dict, samples: str | None) -> InterferenceHeatmap:
    """Values and replicates that share ``noise``.

    Per group of samples, as a jackknife of a mean would see it.
    """
    scores, replicates, errors = {}, {}, {}
    for name, values in heatmap.scores.items():
        groups = noise[name]
        scores[name] = values + groups.mean(dim=0)
        replicates[name] = values + (groups.sum(dim=0) - groups) / (len(groups) - 1)
        errors[name] = groups.std(dim=0) / len(groups) ** 0.5 + 0 * values
    notes = {"samples": samples, "degrees_of_freedom": len(noise["cosine"]) - 1}
    return replace(heatmap, scores=scores, standard_errors=errors, replicates=replicates, notes=notes)


def noise_of(seed: int, size: float, shared_by_all_cells: bool = False) -> dict:
    generator = torch.Generator().manual_seed(seed)
    shape = (16, *make_heatmap().scores["relative"].shape)
    shape = (16, 1, 1, 1, 1, 1) if shared_by_all_cells else shape
    return {
        name: (size * torch.randn(shape, generator=generator, dtype=torch.float64)).expand(
            16, *make_heatmap().scores["relative"].shape
        )
        for name in ("loss_rise", "interference", "relative", "cosine")
    }


def test_what_the_same_samples_have_in_common_cancels() -> None:
    """Noise of 0.25 a cell, nearly all of it the samples', hides a rise of 0.3 from other samples."""
    baseline = make_heatmap()
    worse = changed(baseline, "relative", (0, 1, 1, 3, 3), 0.3)
    noise, jitter = noise_of(1, 1.0), noise_of(2, 0.04)
    both = {name: noise[name] + jitter[name] for name in noise}
    old = with_replicates(baseline, noise, "a")
    report = check_drift(old, with_replicates(worse, both, "a"))
    assert report.same_samples
    assert [cell.name for cell in report.cells] == ["L1.H3.O"]
    difference = jitter["relative"][:, 0, 1, 1, 3, 3]
    assert report.cells[0].standard_error == pytest.approx(float(difference.std() / 4))
    for samples in ("b", None):
        other = check_drift(old, with_replicates(worse, both, samples))
        assert not other.same_samples
        assert not other.drifted
    unknown = with_replicates(baseline, noise, None), with_replicates(worse, both, None)
    assert not check_drift(*unknown).same_samples


def test_groups_of_other_sizes_are_not_compared_one_by_one() -> None:
    noise = noise_of(1, 1.0)
    fewer = {name: values[:8] for name, values in noise.items()}
    pair = with_replicates(make_heatmap(), noise, "a"), with_replicates(make_heatmap(), fewer, "a")
    assert not check_drift(*pair).same_samples


def test_the_mean_of_a_block_is_as_sure_as_the_replicates_of_the_same_samples_say() -> None:
    """Noise that all cells share does not average out; noise of each cell's own does.

    Of others, the worst is taken.
    """
    for shared, samples, expected in (
        (True, "a", 1.0),
        (False, "a", 1 / math.sqrt(LAYERS * HEADS)),
        (False, "b", 1.0),
    ):
        old = with_replicates(make_heatmap(), noise_of(1, 0.4, shared), "a")
        new = with_replicates(make_heatmap(), noise_of(2, 0.4, shared), samples)
        raised = changed(new, "relative", (slice(None),), 9.0)
        findings = check_drift(old, raised, scores=["relative"]).findings
        means = [one.standard_error for one in findings if (one.kind, one.block) == ("block mean", "Q")]
        cells = [one.standard_error for one in findings if (one.kind, one.block) == ("cell", "Q")]
        assert len(means) == 6
        found = sum(means) / len(means)
        assert found == pytest.approx(expected * sum(cells) / len(cells), rel=0.2)


def test_a_rise_within_rounding_is_no_drift_though_samples_are_the_same() -> None:
    baseline = with_replicates(make_heatmap(), noise_of(1, 0.2), "a")
    rounded = changed(baseline, "relative", (slice(None),), 1e-7)
    assert not check_drift(baseline, rounded, tolerance=0.0).drifted


def test_a_replicate_without_data_is_never_no_drift() -> None:
    baseline = with_replicates(make_heatmap(), noise_of(1, 0.2), "a")
    replicates = {name: values.clone() for name, values in baseline.replicates.items()}
    replicates["relative"][3, 0, 1, 0, 0, 0] = math.nan
    with pytest.raises(NotComparableError, match="The current heatmap has no data for 'relative' in 1 of"):
        check_drift(baseline, replace(baseline, replicates=replicates))
    replicates["relative"] = replicates["relative"][:, :, :, :1]
    with pytest.raises(NotComparableError, match="replicates of 'relative' in shape"):
        check_drift(baseline, replace(baseline, replicates=replicates))


def test_the_tolerance_of_a_score_in_units_is_a_share_of_the_largest_clear_value_of_the_baseline() -> None:
    baseline = make_heatmap(error=1e-4)
    loud = baseline.scores["loss_rise"].clone()
    loud[0, 1, 0, 0, 0] = 50.0  # mostly noise
    errors = {name: values.clone() for name, values in baseline.standard_errors.items()}
    errors["loss_rise"][0, 1, 0, 0, 0] = 100.0
    baseline = replace(baseline, scores={**baseline.scores, "loss_rise": loud}, standard_errors=errors)
    clear = loud.clone()
    clear[0, 1, 0, 0, 0] = 0.0
    unit = max(float(clear[a, b].nan_to_num().abs().max()) for a in range(3) for b in range(3) if a != b)
    for share, drifted in ((0.04, False), (0.06, True)):
        current = changed(baseline, "loss_rise", (0, 1, 1, 3, 3), share * unit)
        assert check_drift(baseline, current, scores=("loss_rise",), tolerance=0.05).drifted == drifted
