"""What is called sure harm: a t test in every cell, corrected for their number."""

from dataclasses import replace

import pytest
import torch
from scipy import stats
from synthetic import make_heatmap
from torch import Tensor

from qkov_lightning import InterferenceHeatmap, judge

SHAPE = (2, 2, 4, 8, 4)


def heatmap_of(rise: Tensor, error: float | Tensor = 1.0, **changes: object) -> InterferenceHeatmap:
    """Four layers of eight heads whose predicted rises are these, and 50 samples of two tasks."""
    heatmap = make_heatmap(4, 8, 8)
    scores = {"loss_rise": rise.double()}
    return replace(
        heatmap,
        scores=scores,
        standard_errors={"loss_rise": torch.ones(SHAPE) * error + 0 * rise},
        num_samples=torch.full(SHAPE[1:], 50.0),
        **changes,
    )


def test_sure_cells_are_those_of_the_step_up_procedure() -> None:
    """Benjamini and Hochberg (1995) by hand, over the cells of both ordered pairs."""
    rise = 4 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).double()
    rise[0, 1, 0, 0] = torch.nan
    verdict = judge(heatmap_of(rise), alpha=0.1)
    tested = [(a, b, i) for a, b in ((0, 1), (1, 0)) for i in (~rise[a, b].isnan()).nonzero().tolist()]
    values = [float(rise[(a, b, *place)]) for a, b, place in tested]
    p_values = [2 * stats.t.sf(abs(value), 49) for value in values]
    ranked = sorted(p_values)
    limit = max(p for rank, p in enumerate(ranked, 1) if p <= 0.1 * rank / len(ranked))
    harmful = [value for value, p in zip(values, p_values, strict=True) if p <= limit and value > 0]
    assert [cell.value for cell in verdict.harmful] == sorted(harmful, reverse=True)
    assert 20 < len(harmful) < 120
    found = [cell for pair in verdict.pairs for cell in (*pair.harmful, *pair.helpful)]
    assert len(found) == sum(p <= limit for p in p_values)
    assert [verdict.pair(*pair).num_cells for pair in (("math", "code"), ("code", "math"))] == [124, 128]
    for pair in verdict.pairs:
        assert pair.num_undecided == pair.num_cells - len(pair.harmful) - len(pair.helpful)
        assert all(cell.value < 0 for cell in pair.helpful)
        assert (pair.task_a, pair.task_b) in {("math", "code"), ("code", "math")}


def test_where_nothing_happens_nothing_is_sure_in_95_of_100_heatmaps() -> None:
    alarms = [
        bool(judge(heatmap_of(torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)))).harmful)
        for seed in range(100)
    ]
    assert sum(alarms) <= 5


def test_one_cell_beyond_doubt_is_named() -> None:
    rise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    rise[1, 0, 2, 5, 3] = 9.0
    cell = judge(heatmap_of(rise)).harmful[0]
    assert (cell.task_a, cell.task_b, cell.name) == ("code", "math", "L2.H5.O")


def test_few_groups_ask_for_more() -> None:
    """With 3 degrees of freedom, 9 standard errors are not sure among 256 cells."""
    rise = torch.zeros(SHAPE)
    rise[1, 0, 2, 5, 3] = 9.0
    assert judge(heatmap_of(rise)).harmful
    assert not judge(heatmap_of(rise, notes={"degrees_of_freedom": 3})).harmful


def test_the_rise_in_all_cells_has_the_error_of_what_varies_together() -> None:
    rise = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))
    first = judge(heatmap_of(rise, 0.25)).pair("math", "code")
    assert first.rise == pytest.approx(float(rise[0, 1].sum()))
    assert first.standard_error == pytest.approx(0.25 * 128)
    replicates = rise + torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(1))
    known = heatmap_of(rise, 0.25, replicates={"loss_rise": replicates})
    sums = replicates[:, 0, 1].flatten(1).sum(dim=1)
    expected = float((sums.var(correction=0) * 7).sqrt())
    found = judge(known).pair("math", "code")
    assert found.standard_error == pytest.approx(expected, rel=1e-6)
    layer = replicates[:, 0, 1, 2].flatten(1).sum(dim=1)
    (part,) = [one for one in found.layers if one.name == "L2"]
    assert part.standard_error == pytest.approx(float((layer.var(correction=0) * 7).sqrt()), rel=1e-6)
    assert part.rise == pytest.approx(float(rise[0, 1, 2].sum()))


def test_no_spread_is_no_doubt() -> None:
    rise = torch.zeros(SHAPE)
    rise[0, 1, 0, 0, 0] = 1e-3
    assert [cell.name for cell in judge(heatmap_of(rise, 0.0)).harmful] == ["L0.H0.Q"]


def test_a_heatmap_without_the_score_is_refused() -> None:
    known = make_heatmap()
    heatmap = replace(known, scores={k: v for k, v in known.scores.items() if k != "loss_rise"})
    with pytest.raises(
        ValueError, match=r"has no 'loss_rise' \(interference, relative, cosine\).*measure it again"
    ):
        judge(heatmap)


def test_parts_add_up_to_the_whole_and_count_the_sure_cells() -> None:
    rise = 5 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    for pair in judge(heatmap_of(rise)).pairs:
        for parts, num_parts in ((pair.heads, 32), (pair.layers, 4), (pair.blocks, 4)):
            assert len(parts) == num_parts
            assert sum(part.rise for part in parts) == pytest.approx(pair.rise)
            assert sum(part.num_harmful for part in parts) == len(pair.harmful)
            assert sum(part.num_helpful for part in parts) == len(pair.helpful)
            assert [part.rise for part in parts] == sorted((part.rise for part in parts), reverse=True)


def test_a_shared_head_counts_in_parts_for_the_query_heads_that_it_serves() -> None:
    heatmap = make_heatmap(layers=3, heads=4, kv_heads=2)
    pair = heatmap.verdict.pair("math", "code")
    values = heatmap.values("math", "code", "loss_rise")
    (head,) = [one for one in pair.heads if one.name == "L0.H3"]
    expected = values[0, 3, 0] + values[0, 3, 3] + (values[0, 1, 1] + values[0, 1, 2]) / 2
    assert head.rise == pytest.approx(float(expected))
    assert sum(one.rise for one in pair.heads) == pytest.approx(pair.rise)


def test_who_is_hurt_and_who_pushes() -> None:
    rise = torch.zeros(SHAPE)
    rise[1, 0, 2, 5, 3], rise[1, 0, 0, 0, 0], rise[0, 1, 1, 1, 1] = 30.0, 10.0, -20.0
    verdict = heatmap_of(rise).verdict
    assert (verdict.most_affected, verdict.most_pushing) == ("code", "math")
    first = verdict.pairs[0]
    assert [round(first.share(cell), 3) for cell in first.cells[:3]] == [0.75, 0.25, 0.0]
    assert verdict.pair("math", "code").cells[-1].name == "L1.H1.K"
    assert [cell.value for cell in verdict.helpful] == [-20.0]
    quiet = heatmap_of(torch.zeros(SHAPE)).verdict
    assert (quiet.most_affected, quiet.most_pushing, quiet.harmful) == (None, None, ())
    with pytest.raises(KeyError, match="math <- prose was not judged"):
        quiet.pair("math", "prose")


@pytest.mark.parametrize("spread", [1.5, 3.0])
def test_as_many_more_samples_decide_as_many_cells_as_it_says(spread: float) -> None:
    """Effects known, noise drawn: predictions from 50 samples against draws with the errors of more."""
    predicted, found = 0, 0
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        effects = spread * torch.randn(SHAPE, generator=generator)
        few = heatmap_of(effects + torch.randn(SHAPE, generator=generator)).verdict
        known = few.sufficiency
        assert known.num_samples == 50
        shrunk = (50 / (50 + known.more_samples)) ** 0.5
        more = heatmap_of(effects + shrunk * torch.randn(SHAPE, generator=generator), shrunk).verdict
        still_open = {(cell.task_a, cell.name) for pair in more.pairs for cell in pair.undecided}
        predicted += known.decides
        found += sum(
            (cell.task_a, cell.name) not in still_open for pair in few.pairs for cell in pair.undecided
        )
    assert predicted == pytest.approx(found, rel=0.25)


def test_the_smallest_rise_that_is_visible() -> None:
    """A lone cell beyond it is called sure, one below it is not."""
    quiet = torch.zeros(SHAPE)
    visible = heatmap_of(quiet).verdict.sufficiency.visible
    for factor, count in ((1.01, 1), (0.99, 0)):
        rise = quiet.clone()
        rise[0, 1, 0, 0, 0] = factor * visible
        assert len(heatmap_of(rise).verdict.harmful) == count
