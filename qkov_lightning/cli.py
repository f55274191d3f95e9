"""The ``qkov`` command."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import auto_cli
from rich.console import Console

from qkov_lightning.heatmap import HeatmapError, InterferenceHeatmap
from qkov_lightning.inspection import describe, load_model, token_batch
from qkov_lightning.terminal import overview
from qkov_lightning.verification import verify_projections


def show(run: Path, top: int = 10) -> None:
    """Show a heatmap in the terminal.

    Args:
        run: A heatmap file, or a folder that holds one somewhere below (the newest is shown).
        top: Number of hottest cells per task pair.
    """
    Console().print(overview(load_run(run), top))


def load_run(run: Path) -> InterferenceHeatmap:
    """The newest heatmap at or below a path.

    Raises:
        FileNotFoundError: If there is none.
    """
    if run.is_file():
        return InterferenceHeatmap.load(run)
    found = sorted(run.rglob("latest.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"No heatmap at {run}: expected a heatmap file, or a folder with a `latest.json` below."
        )
    return InterferenceHeatmap.load(found[-1])


def inspect(model: str, verify: bool = False, num_tokens: int = 512) -> None:
    """Show which features of which module belong to each head of a model.

    Args:
        model: Import path ``package.module:function`` to a function that returns the model, or a local
            ``from_pretrained`` folder.
        verify: Also prove on random tokens that each slice is the head that the model computes.
        num_tokens: Tokens of a sample, for the estimate of its size in the cache.

    Raises:
        ValueError: If a slice is not the head that it is said to be.
    """
    loaded = load_model(model)
    Console().print(describe(loaded, num_tokens))
    if verify:
        verification = verify_projections(loaded, token_batch(loaded))
        if not verification.passed:
            raise ValueError(str(verification))
        Console().print(str(verification))


def main() -> None:
    """Entry point of the ``qkov`` command."""
    try:
        auto_cli(
            {"show": show, "inspect": inspect},
            description="See where in a transformer several tasks interfere.",
        )
    except (FileNotFoundError, ValueError, HeatmapError) as error:
        sys.exit(f"qkov: {error}")
