"""One table of all numbers, as it stands in the README."""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch

ROWS = pytest.StashKey[list[tuple[str, str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, default=10, help="of the capture benchmarks, a multiple of 10")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str, object, str], None]:
    """Puts a row into the table: what, result, goal."""

    def add(what: str, result: object, goal: str = "") -> None:
        request.config.stash[ROWS].append((what, str(result), goal))
        # At once too: all of them take a while.
        terminal = request.config.pluginmanager.getplugin("terminalreporter")
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            terminal.write_line(f"{what}: {result}")
        # Beside the times in --benchmark-json.
        request.getfixturevalue("benchmark").extra_info[what] = str(result)

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.write_line("\n| what | result | goal |\n|---|---|---|")
    for row in config.stash[ROWS]:
        terminalreporter.write_line(f"| {' | '.join(row)} |")
