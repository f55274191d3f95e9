"""The command, as a shell calls it."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import qkov_lightning
from qkov_lightning.cli import main

API = Path(__file__).parents[2] / "docs" / "api.md"


def test_the_version_is_that_of_the_installed_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["qkov", "--version"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert capsys.readouterr().out == f"qkov {version('qkov-lightning')}\n"
    assert qkov_lightning.__version__ == version("qkov-lightning")


def test_python_runs_the_package_as_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    monkeypatch.setattr(sys, "argv", ["python -m qkov_lightning", "show", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("qkov_lightning", run_name="__main__")


def test_the_documentation_lists_every_public_name_once() -> None:
    listed = re.findall(r"\.\. auto\w+:: qkov_lightning\.(\w+)", API.read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(set(qkov_lightning.__all__) - {"__version__"})
