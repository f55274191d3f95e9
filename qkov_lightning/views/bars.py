"""Lines and progress beside the trainer's own progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from tqdm.auto import tqdm


def print_beside_bar(bar: Any, renderable: RenderableType) -> None:
    """Print above the trainer's progress bar; nothing where the user switched the bar off."""
    if bar is None or not bar.is_enabled:
        return
    progress = getattr(bar, "progress", None)
    if progress is not None:  # RichProgressBar
        progress.print(renderable)
        return
    console = Console(width=None if sys.stdout.isatty() else 100)
    with console.capture() as captured:
        console.print(renderable)
    bar.print(captured.get().rstrip())


@contextmanager
def progress_task(bar: Any, total: int) -> Iterator[Callable[[], None]]:
    """One task in the trainer's own progress bar; nothing where the user switched the bar off.

    A second bar would draw over the lines of Lightning's.

    Args:
        bar: The trainer's progress bar callback, or None.
        total: Number of steps.

    Yields:
        A function that says that one step is done.
    """
    enabled = bar is not None and bar.is_enabled
    progress = getattr(bar, "progress", None)
    if enabled and progress is not None:  # RichProgressBar
        earlier = [task.id for task in progress.tasks if task.description == "Interference"]
        task = earlier[0] if earlier else progress.add_task("Interference", total=total)
        progress.reset(task, total=total, visible=True)

        def advance() -> None:
            progress.update(task, advance=1)
            bar.refresh()

        try:
            yield advance
        finally:
            # Hidden for the next time, not removed: Lightning 2.4 finds its tasks by their place in the list.
            progress.update(task, visible=False)
    elif enabled and hasattr(bar, "init_validation_tqdm"):  # TQDMProgressBar
        # Below the bars of training and validation.
        position = 2 * bar.process_position + 2
        with tqdm(total=total, desc="Interference", position=position, leave=False, file=sys.stdout) as line:
            yield line.update
    else:
        yield lambda: None
