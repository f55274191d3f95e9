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
    assert [pair.num_cells for pair in verdict.pairs] == [124, 128]
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
    (first, _) = judge(heatmap_of(rise, 0.25)).pairs
    assert first.rise == pytest.approx(float(rise[0, 1].sum()))
    assert first.standard_error == pytest.approx(0.25 * 128)
    replicates = rise + torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(1))
    known = heatmap_of(rise, 0.25, replicates={"loss_rise": replicates})
    sums = replicates[:, 0, 1].flatten(1).sum(dim=1)
    expected = float((sums.var(correction=0) * 7).sqrt())
    assert judge(known).pairs[0].standard_error == pytest.approx(expected, rel=1e-6)


def test_no_spread_is_no_doubt() -> None:
    rise = torch.zeros(SHAPE)
    rise[0, 1, 0, 0, 0] = 1e-3
    assert [cell.name for cell in judge(heatmap_of(rise, 0.0)).harmful] == ["L0.H0.Q"]


def test_a_heatmap_without_the_score_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"has no 'loss_rise' \(interference, relative, cosine\).*measure it again"
    ):
        judge(make_heatmap())
