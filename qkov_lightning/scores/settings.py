"""What the scores depend on apart from the gradients: one value, from the user's YAML to the formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qkov_lightning.scores.updates import STEP_SIZE, UpdateDirection


@dataclass(frozen=True)
class ScoreSettings:
    """Settings that change the numbers, the same for monitor, probe and metric.

    Attributes:
        damping: Added to the Fisher, relative to its mean over a slice.
        update: Direction in which a task updates the weights: that of "adam" or of "sgd".
        step_size: Length of the step along it: the learning rate times the number of steps.
        fisher_decay: Decay of the Fisher's EMA per captured step.
        num_hot_cells: Cells per task pair whose strongest sample pairs are searched.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> ScoreSettings(damping=-1.0)
        Traceback (most recent call last):
        ValueError: ScoreSettings: damping is -1.0, expected a positive number.
    """

    damping: float = 1e-3
    update: UpdateDirection = "adam"
    step_size: float = STEP_SIZE
    fisher_decay: float = 0.95
    num_hot_cells: int = 10

    def __post_init__(self) -> None:
        check_values(
            "ScoreSettings",
            ("update", self.update, self.update in {"adam", "sgd"}, "adam or sgd"),
            *number_rules(self.damping, self.step_size, self.fisher_decay, self.num_hot_cells),
        )


Rule = tuple[str, object, bool, str]
"""Name of an argument, its value, whether that is valid, and what was expected."""


def number_rules(damping: float, step_size: float, fisher_decay: float, num_hot_cells: int) -> Sequence[Rule]:
    """The rules for the numbers, under the names that the monitor has for them, too."""
    return (
        ("damping", damping, damping > 0, "a positive number"),
        ("step_size", step_size, step_size > 0, "a positive number"),
        ("fisher_decay", fisher_decay, 0 <= fisher_decay < 1, "at least 0 and less than 1"),
        ("num_hot_cells", num_hot_cells, num_hot_cells >= 0, "at least 0"),
    )


def check_values(owner: str, *rules: Rule) -> None:
    """Refuse the first value that breaks its rule.

    Raises:
        ValueError: If there is one.
    """
    for name, value, valid, expected in rules:
        if not valid:
            raise ValueError(f"{owner}: {name} is {value!r}, expected {expected}.")
