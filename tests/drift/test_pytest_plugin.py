"""What the pytest fixture promises."""

from pathlib import Path

import pytest

# Loaded before pytester notes what is: it drops, and cannot load again, what a run inside a run imports.
import qkov_lightning.drift.reports  # noqa: F401

pytest_plugins = ["pytester"]

TESTS = """
    import torch
    from qkov_lightning import InterferenceHeatmap
    from qkov_lightning.measure.cells import BlockInfo, Layer

    def make_heatmap(rise, tasks=("code", "math")):
        shape = (2, 2, 1, 2, 4)
        scores = {name: torch.ones(shape, dtype=torch.float64) for name in ("loss_rise", "interference", "relative", "cosine")}
        scores["relative"][0, 1, 0, 1, 3] += rise
        errors = {name: torch.full(shape, 0.05, dtype=torch.float64) for name in scores}
        layers = (Layer("attention", {block: BlockInfo(block, 2, 1, "measured") for block in "QKVO"}),)
        num_samples = torch.full((2, 1, 2, 4), 32.0, dtype=torch.float64)
        return InterferenceHeatmap(tasks, layers, scores, errors, num_samples)

    def test_heads(assert_no_interference_drift):
        assert_no_interference_drift(make_heatmap(RISE, TASKS), "baseline.json", tolerance=TOLERANCE)
"""


def run(
    pytester: pytest.Pytester,
    *options: str,
    rise: float = 0.0,
    tasks: tuple = ("code", "math"),
    tolerance: float = 0.05,
) -> pytest.RunResult:
    body = TESTS.replace("RISE", str(rise)).replace("TASKS", repr(tasks)).replace("TOLERANCE", str(tolerance))
    pytester.makepyfile(test_heads=body)
    return pytester.runpytest_inprocess("-p", "qkov_lightning.drift.pytest_plugin", *options)


def test_a_baseline_is_written_on_demand_only_and_then_guards(pytester: pytest.Pytester) -> None:
    missing = run(pytester)
    missing.assert_outcomes(failed=1)
    missing.stdout.fnmatch_lines([
        "*No interference baseline at *baseline.json*pytest --update-interference-baseline test_heads.py::test_heads*"
    ])
    assert not Path("baseline.json").exists()
    run(pytester, "--update-interference-baseline").assert_outcomes(passed=1)
    run(pytester).assert_outcomes(passed=1)
    written = (pytester.path / "baseline.json").read_bytes()
    drifted = run(pytester, rise=1.0)
    drifted.assert_outcomes(failed=1)
    drifted.stdout.fnmatch_lines(["*L0.H1.O (attention): relative of math pushing on code went from 1 to 2*"])
    run(pytester, rise=1.0, tolerance=2.0).assert_outcomes(passed=1)
    assert (pytester.path / "baseline.json").read_bytes() == written


def test_what_cannot_be_compared_fails(pytester: pytest.Pytester) -> None:
    run(pytester, "--update-interference-baseline").assert_outcomes(passed=1)
    other = run(pytester, tasks=("code", "prose"))
    other.assert_outcomes(failed=1)
    other.stdout.fnmatch_lines(["*Interference was not compared: The baseline has the tasks code, math*"])
