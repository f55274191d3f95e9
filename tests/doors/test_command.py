"""The command, as a shell calls it."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import qkov_lightning
from qkov_lightning.cli import COMMANDS, main

API = Path(__file__).parents[2] / "docs" / "api.md"


def test_the_version_is_that_of_the_installed_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["qkov", "--version"])
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


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["qkov", command, "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "usage: qkov" in capsys.readouterr().out


def test_an_unknown_command_is_refused_with_the_list(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["qkov", "shwo", "runs"])
    with pytest.raises(SystemExit, match="2"):
        main()
    error = capsys.readouterr().err
    assert "there is no command 'shwo'" in error
    assert all(f"qkov {command} " in error for command in COMMANDS)
