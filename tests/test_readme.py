"""The README promises nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from synthetic import make_heatmap

from qkov_lightning.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
REGIMES = (ROOT / "docs" / "regimes.md").read_text(encoding="utf-8")


def test_the_first_example_runs() -> None:
    exec(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0], {})


def test_the_second_example_runs() -> None:
    heatmap = make_heatmap()
    code = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[1]
    exec(code, {"monitor": SimpleNamespace(heatmap=heatmap)})


def test_every_regime_names_a_test_that_exists() -> None:
    rows = re.findall(r"^\|.*`(?:\w+/)?test_\w+\.py.*\|$", REGIMES, flags=re.MULTILINE)
    assert len(rows) > 10
    for row in rows:
        file = None
        for name, test in re.findall(r"`((?:\w+/)?test_\w+\.py)?(?:::(\w+))?`", row):
            if not (name or test):
                continue
            file = name or file
            text = (ROOT / "tests" / str(file)).read_text(encoding="utf-8")
            assert not test or f"def {test}(" in text, f"{file}::{test}"


@pytest.mark.parametrize("command", ["show", "report", "inspect", "verify", "gate"])
def test_every_command_that_it_names_exists(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"`qkov {command}" in README
    monkeypatch.setattr("sys.argv", ["qkov", command, "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()


def test_every_file_that_it_names_exists() -> None:
    named = re.findall(r"(?:examples|configs|tests)/[\w./]*", README)
    assert len(named) > 5
    for path in named:
        assert (ROOT / path).exists(), path
