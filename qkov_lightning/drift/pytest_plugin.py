"""Pytest fixture ``assert_no_interference_drift``, with ``--update-interference-baseline``.

Not loaded by itself, so that no run of pytest imports torch for nothing. In ``conftest.py``::

    pytest_plugins = ["qkov_lightning.drift.pytest_plugin"]
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qkov_lightning.drift.comparability import NotComparableError
from qkov_lightning.drift.drift import check_drift
from qkov_lightning.drift.reports import as_text
from qkov_lightning.measure.encoding import HeatmapError
from qkov_lightning.measure.heatmap import InterferenceHeatmap

OPTION = "--update-interference-baseline"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that writes baselines."""
    parser.getgroup("qkov-lightning").addoption(
        OPTION, action="store_true", help="Accept the measured interference as the new baseline."
    )


@pytest.fixture
def assert_no_interference_drift(
    request: pytest.FixtureRequest,
) -> Callable[..., None]:
    """A function of a heatmap and a baseline file that fails the test if interference drifted.

    The file is looked for next to the test. Further arguments are those of ``qkov_lightning.check_drift``.
    What cannot be compared fails, too. With ``--update-interference-baseline`` the heatmap is written to the
    file instead.
    """

    def check(heatmap: InterferenceHeatmap, baseline: str | Path, **arguments: Any) -> None:
        __tracebackhide__ = True
        path = request.path.parent / baseline
        if request.config.getoption(OPTION):
            heatmap.save(path)
            return
        command = f"pytest {OPTION} {request.node.nodeid}"
        if not path.is_file():
            pytest.fail(
                f"No interference baseline at {path}. Accept the current heatmap with: {command}", False
            )
        try:
            report = check_drift(InterferenceHeatmap.load(path), heatmap, **arguments)
        except (NotComparableError, HeatmapError) as error:
            pytest.fail(f"Interference was not compared: {error}", pytrace=False)
        if report.drifted:
            pytest.fail(as_text(report, command), pytrace=False)

    return check
