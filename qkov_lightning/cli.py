"""The ``qkov`` command: the list of what it can do. A command is imported when it is called."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from qkov_lightning import __version__

COMMANDS = {
    "show": ("cli_results", "Print the verdict on a run: who hurts whom, in which head, how sure."),
    "report": ("cli_results", "Write the whole result as one page for the browser."),
    "inspect": ("cli_models", "Show which features of which module belong to each head of a model."),
    "verify": ("cli_models", "Compare captured gradients with those of each sample alone."),
    "probe": ("cli_models", "Measure fixed samples at the weights of a checkpoint."),
    "protect": ("cli_models", "Measure what HeadProjector keeps while other tasks train."),
    "gate": ("cli_results", "Exit with 1 if interference rose beyond noise."),
    "diff": ("cli_results", "Show what rose from one heatmap to another."),
    "baseline": ("cli_results", "`baseline update` accepts a heatmap for `gate`."),
    "clean": ("cli_results", "Remove the gradient caches that trainings left behind."),
}
"""Commands: where each is, and what it does."""

SWITCHES = ("--all", "--heads", "--verify", "--discover", "--dry_run")
"""Options that need no value."""


def main() -> None:
    """Entry point of the ``qkov`` command."""
    given = sys.argv[1:]
    name = next((word for word in given if not word.startswith("-")), None)
    if given[:1] == ["--version"]:
        sys.stdout.write(f"qkov {__version__}\n")
        return
    asked = given[:1] in (["-h"], ["--help"])
    if asked or name not in COMMANDS:
        _list_commands(None if asked else name)
        return
    # Classes in the current folder can be named, as with `python -m`.
    sys.path.insert(0, str(Path.cwd()))
    from jsonargparse import auto_cli

    from qkov_lightning.drift.gate import NOT_COMPARABLE, WRONG_USAGE
    from qkov_lightning.measure.encoding import HeatmapError

    try:
        status = auto_cli(
            {name: _command(name)},
            args=_arguments(given),
            description="See where in a transformer several tasks interfere.",
            prog="qkov",
            version=__version__,
        )
    except HeatmapError as error:
        _stop(error, NOT_COMPARABLE)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        _stop(error, WRONG_USAGE)
    if status:
        sys.exit(status)


def _command(name: str) -> Callable[..., Any] | dict[str, Any]:
    module = import_module(f"qkov_lightning.{COMMANDS[name][0]}")
    if name == "baseline":
        return {"_help": COMMANDS[name][1], "update": module.update_baseline}
    command: Callable[..., Any] = getattr(module, name)
    return command


def _list_commands(unknown: str | None) -> None:
    lines = [
        "usage: qkov COMMAND ...",
        "",
        "See where in a transformer several tasks interfere.",
        "",
        *(f"  qkov {name:<9} {what}" for name, (_, what) in COMMANDS.items()),
        "",
        "`qkov COMMAND --help` lists its options, `qkov --version` prints the version.",
    ]
    if unknown is not None:
        sys.stderr.write("\n".join([*lines, "", f"qkov: there is no command {unknown!r}."]) + "\n")
        sys.exit(2)
    sys.stdout.write("\n".join(lines) + "\n")


def _stop(error: Exception, status: int) -> NoReturn:
    """Never status 1, which `qkov gate` keeps for drift."""
    sys.stderr.write(f"qkov: {error}\n")
    sys.exit(status)


def _arguments(given: list[str]) -> list[str]:
    """What was given, as the parser takes it: a list as one argument in JSON, a switch as true."""
    given = [
        part
        for word, after in zip(given, [*given[1:], ""], strict=True)
        for part in ((word, "true") if word in SWITCHES and after not in {"true", "false"} else (word,))
    ]
    if given[0] != "report":
        return given
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("-o", "--output")
    known, rest = parser.parse_known_args(given[1:])
    runs = [json.dumps(known.runs)] if known.runs else []
    return ["report", *runs, *(["--output", known.output] if known.output else []), *rest]
