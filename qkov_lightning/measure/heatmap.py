"""The result: scores per (layer, head, block), which everything downstream reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from qkov_lightning.heads.projections import BLOCKS
from qkov_lightning.measure.cells import Cell, Layer, SamplePair
from qkov_lightning.measure.encoding import HeatmapError, decode, encode
from qkov_lightning.scores.scores import HARM
from qkov_lightning.store.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from qkov_lightning.measure.verdict import PairVerdict, Verdict

MAX_SHOWN_PAIRS = 12


@dataclass(frozen=True, eq=False, repr=False)
class InterferenceHeatmap:
    """Scores of every ordered task pair in every (layer, head, block).

    In every tensor the axes are ``[task_a, task_b, layer, head, block]``; heads are those of the block itself
    (fewer for K and V under grouped-query attention), and NaN means "no data", never zero.

    Attributes:
        tasks: Names along the task axes. task_a is the task whose sensitivity is measured, task_b the
            one that pushes; a pair of a task with itself is the within-task control.
        layers: The attention layers.
        scores: Values by score name.
        standard_errors: Standard errors by score name.
        num_samples: Samples behind each cell, ``[task, layer, head, block]``.
        step: Optimiser steps done.
        epoch: Epoch, from 0.
        pairs: Sample pairs of the cells that the verdict names first, the most harm first.
        notes: Facts about the run that the numbers rest on (dropped steps, unreadable files, ...).
        replicates: Values by score name without each group of samples, from which the standard errors were
            made; empty where they were made in another way.
    """

    tasks: tuple[str, ...]
    layers: tuple[Layer, ...]
    scores: Mapping[str, Float[Tensor, "task_a task_b layer head block"]]
    standard_errors: Mapping[str, Float[Tensor, "task_a task_b layer head block"]]
    num_samples: Float[Tensor, "task layer head block"]
    step: int = 0
    epoch: int = 0
    pairs: tuple[SamplePair, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)
    replicates: Mapping[str, Float[Tensor, "group task_a task_b layer head block"]] = field(
        default_factory=dict
    )

    @cached_property
    def verdict(self) -> "Verdict":  # noqa: UP037 - known to the type checker alone
        """The answer: which cells surely hurt a task, which help, and what the samples leave open.

        Raises:
            ValueError: If the heatmap has no ``loss_rise``.
        """
        from qkov_lightning.measure.verdict import judge

        return judge(self)

    def __getitem__(self, pair: tuple[str, str]) -> "PairVerdict":  # noqa: UP037
        """The verdict on one ordered pair: ``heatmap["math", "code"]`` is what code does to math.

        Raises:
            KeyError: If the heatmap does not know a task.
        """
        from qkov_lightning.measure.verdict import judge

        if set(pair) - set(self.tasks):
            raise KeyError(f"{' <- '.join(pair)}: this heatmap has {', '.join(map(repr, self.tasks))}.")
        return self.verdict.pair(*pair) if pair in self.task_pairs else judge(self, [pair]).pairs[0]

    def __repr__(self) -> str:
        tasks, shape = ", ".join(map(repr, self.tasks)), f"{self.num_layers} layers x {self.num_heads} heads"
        return f"<InterferenceHeatmap of {tasks}: {shape}, {self.when}>"

    def _repr_html_(self) -> str:
        from qkov_lightning.views.notebook import to_html

        return to_html(self)

    def plot(self, a: str | None = None, b: str | None = None, score: str = HARM) -> "Figure":  # noqa: UP037
        """The overview, or one score of one task pair.

        Args:
            a: Task that is hurt; without it, all pairs are drawn.
            b: Task that pushes.
            score: Which score, of one pair.

        Returns:
            A matplotlib figure.

        Raises:
            ValueError: If the heatmap does not know a task or the score, or one of the tasks is missing.
        """
        from qkov_lightning.views.figures import heatmap_figure
        from qkov_lightning.views.overview import overview

        if a is not None and b is not None:
            return heatmap_figure(self, a, b, score)
        if (a, b, score) != (None, None, HARM):
            raise ValueError(
                f"plot got a={a!r}, b={b!r} and score={score!r}, expected both tasks of a pair, or nothing."
            )
        return overview(self)

    def to_frame(self) -> Any:
        """A row for every cell, ordered pair and score, as in ``cells.csv``.

        Returns:
            A ``pandas.DataFrame``.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        from qkov_lightning.views.tables import COLUMNS, cell_rows

        try:
            import pandas
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "InterferenceHeatmap.to_frame needs pandas, which is not installed. Fix: pip install pandas."
            ) from error
        return pandas.DataFrame(list(cell_rows(self)), columns=list(COLUMNS))

    @property
    def num_layers(self) -> int:
        """Number of attention layers."""
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        """Largest number of heads of any block."""
        return int(self.num_samples.shape[2])

    @property
    def task_pairs(self) -> tuple[tuple[str, str], ...]:
        """Ordered pairs of two different tasks; of the task with itself if there is only one."""
        if len(self.tasks) == 1:
            return ((self.tasks[0], self.tasks[0]),)
        return tuple((a, b) for a in self.tasks for b in self.tasks if a != b)

    @property
    def shown_pairs(self) -> tuple[tuple[str, str], ...]:
        """The task pairs to show where there is no room for all: the first twelve of the verdict.

        All pairs of up to four tasks; ten tasks have ninety. Files have them all.
        """
        return tuple(pair.tasks for pair in self.verdict.pairs[:MAX_SHOWN_PAIRS])

    @property
    def shown_scores(self) -> list[str]:
        """Names of the scores, that of the verdict first."""
        return sorted(self.scores, key=lambda score: score != HARM)

    @property
    def when(self) -> str:
        """When it was measured, for people."""
        return f"epoch {self.epoch}, step {self.step}"

    @property
    def samples_per_task(self) -> dict[str, int]:
        """Samples of each task in the cell that has most."""
        return {task: int(self.num_samples[i].max()) for i, task in enumerate(self.tasks)}

    def values(self, a: str, b: str, score: str = "interference") -> Float[Tensor, "layer head block"]:
        """Score of one task pair.

        Raises:
            ValueError: If the heatmap does not know the task or the score.
        """
        return self._of(self.scores, a, b, score)

    def errors(self, a: str, b: str, score: str = "interference") -> Float[Tensor, "layer head block"]:
        """Standard errors of one task pair.

        Raises:
            ValueError: If the heatmap does not know the task or the score.
        """
        return self._of(self.standard_errors, a, b, score)

    def _of(self, what: Mapping[str, Tensor], a: str, b: str, score: str) -> Tensor:
        for task in (a, b):
            if task not in self.tasks:
                raise ValueError(
                    f"Task {task!r} was never seen; this heatmap has {', '.join(map(repr, self.tasks))}."
                )
        if score not in what:
            raise ValueError(f"Unknown score {score!r}; this heatmap has {', '.join(what)}.")
        return what[score][self.tasks.index(a), self.tasks.index(b)]

    def per_query_head(
        self, a: str, b: str, score: str = "interference"
    ) -> Float[Tensor, "layer query_head block"]:
        """Like ``values``, with each shared K or V head repeated for the query heads that read it."""
        native = self.values(a, b, score)
        expanded = torch.full_like(native, torch.nan)
        for index, layer in enumerate(self.layers):
            for block, info in layer.blocks.items():
                column = BLOCKS.index(block)
                heads = native[index, : info.num_heads, column].repeat_interleave(info.query_group)
                expanded[index, : len(heads), column] = heads
        return expanded

    def cells(self, a: str, b: str, score: str = "interference") -> list[Cell]:
        """Cells of a task pair that have data, highest score first."""
        values, errors = self.values(a, b, score), self.errors(a, b, score)
        found = [
            Cell(a, b, layer, self.layers[layer].name, head, BLOCKS[block], float(values[layer, head, block]),
                 float(errors[layer, head, block]))
            for layer, head, block in (~values.isnan()).nonzero().tolist()
        ]  # fmt: skip
        return sorted(found, key=lambda cell: -cell.value)

    def summary(self, a: str, b: str, score: str = "interference") -> dict[str, Any]:
        """The pair in a dictionary: mean per block, the most conflicted block, the maximum and where it is.

        Means run over query heads, like the shapes. A block without data has a mean of None.

        Raises:
            ValueError: If the heatmap does not know the task or the score.
        """
        values = self.per_query_head(a, b, score)
        means = values.nanmean(dim=(0, 1))
        block_means = {
            block: None if bool(means[index].isnan()) else float(means[index])
            for index, block in enumerate(BLOCKS)
        }
        measured = {block: mean for block, mean in block_means.items() if mean is not None}
        hottest = next(iter(self.cells(a, b, score)), None)
        return {
            "block_means": block_means,
            "most_conflicted_block": max(measured, key=measured.__getitem__) if measured else None,
            "max_interference": hottest.value if hottest else None,
            "max_location": None
            if hottest is None
            else {
                "layer": hottest.layer,
                "layer_name": hottest.layer_name,
                "head": hottest.head,
                "block": hottest.block,
            },
            "tasks_compared": [a, b],
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "heatmap_shape": dict.fromkeys(BLOCKS, (self.num_layers, self.num_heads)),
        }

    def save(self, path: str | Path) -> None:
        """Write JSON, completely or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> InterferenceHeatmap:
        """Read what ``save`` wrote.

        Raises:
            HeatmapError: If the file is no heatmap, or one of another schema.
            FileNotFoundError: If there is no such file.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except HeatmapError as error:
            raise HeatmapError(f"{path}: {error}") from error
        except UnicodeDecodeError as error:
            raise HeatmapError(f"{path}: not UTF-8 text: {error}") from error

    def to_json(self) -> str:
        """JSON in which NaN is null; ``from_json`` gives back exactly the same numbers."""
        return encode(vars(self), [self.summary(a, b) for a, b in self.task_pairs])

    @classmethod
    def from_json(cls, text: str) -> InterferenceHeatmap:
        """Inverse of ``to_json``.

        Raises:
            HeatmapError: If the text is no heatmap, or one of another schema.
        """
        return cls(**decode(text))
