"""Which heads are measured at a time, and in how many passes."""

from __future__ import annotations

import pytest
from models import Classifier, GroupedAttention

from qkov_lightning import find_projections
from qkov_lightning.measure.allotment import Plan, SweptHeads, heads_of

WEIGHTS = 480
"""Of a layer."""


def heads() -> list[SweptHeads]:
    model = Classifier([GroupedAttention() for _ in range(4)], width=10)
    return heads_of(model, find_projections(model), 4)


def plan(max_numbers: int, replicates: str = "linear", num_tasks: int = 2) -> Plan:
    return Plan.of(heads(), num_tasks, replicates, 16, max_numbers)  # type: ignore[arg-type]


def stages_of(one: Plan) -> list[dict[int, set[str]]]:
    """For each pass of the only sweep, what becomes of the heads of each layer."""
    (sweep,) = one.sweeps
    result = []
    for each in sweep.passes:
        layers: dict[int, set[str]] = {}
        for place, stages in each.stages.items():
            layers.setdefault(sweep.heads[place].projection.layer, set()).add(" ".join(stages))
        result.append(layers)
    return result


def in_all(stages: str) -> dict[int, set[str]]:
    return {layer: {stages} for layer in range(4)}


def test_three_passes_suffice_where_memory_does() -> None:
    # Of two tasks: 10 sums to compare, 8 to weigh, 4 numbers for what waits.
    assert stages_of(plan(4 * WEIGHTS * 22)) == [
        in_all("add"),
        in_all("compare weigh"),
        in_all("derive"),
    ]


def test_with_less_memory_the_topmost_heads_take_a_fourth_pass() -> None:
    # 8 numbers too few for a layer and a half.
    added, compared, weighed, derived = stages_of(plan(4 * WEIGHTS * 22 - 8 * WEIGHTS * 3 // 2))
    assert added == in_all("add")
    assert compared[3] == {"compare"}
    assert compared[2] == {"compare", "compare weigh"}
    assert compared[1] == compared[0] == {"compare weigh"}
    assert weighed[3] == {"weigh"}
    assert weighed[2] == {"weigh", "derive"}
    assert weighed[1] == weighed[0] == {"derive"}
    assert derived == {3: {"derive"}, 2: {"derive"}}


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 17])
@pytest.mark.parametrize("replicates", ["exact", "linear"])
def test_every_head_goes_through_all_stages_in_turn_within_memory(replicates: str, num_tasks: int) -> None:
    whole = plan(10**9, replicates, num_tasks)
    assert len(whole.sweeps) == 1
    before = whole.num_passes
    order = ["add", "compare"] if replicates == "exact" else ["add", "compare", "weigh", "derive"]
    for share in (1.0, 0.9, 0.8, 0.7, 0.5, 0.3):
        room = int(share * whole.max_numbers)
        found = plan(room, replicates, num_tasks)
        assert found.max_numbers <= room
        assert found.num_passes >= before
        before = found.num_passes
        for sweep in found.sweeps:
            for place in range(len(sweep.heads)):
                gone_through = [one for each in sweep.passes for one in each.stages.get(place, ())]
                assert gone_through == order
        swept = [one.projection.module_name for sweep in found.sweeps for one in sweep.heads]
        assert swept == [one.projection.module_name for one in heads()]


def test_what_does_not_fit_even_alone_is_refused() -> None:
    # The largest: four heads of O, 200 weights, 18 numbers of each at least.
    assert plan(200 * 18).max_numbers <= 200 * 18
    with pytest.raises(ValueError, match=r"holds the sums of 199 weights at a time, expected at least 200"):
        plan(200 * 18 - 1)
