"""Gradients of a few heads, held in memory for the sample pairs of their cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qkov_lightning.capture.factors import CapturedStep
from qkov_lightning.measure.allotment import SweptHeads
from qkov_lightning.measure.cells import Cell, SamplePair
from qkov_lightning.measure.pairs import pairs_of_head
from qkov_lightning.measure.passes import ProbeSamples
from qkov_lightning.scores.settings import ScoreSettings

Key = tuple[int, str, int]
"""Layer, block and head."""


@dataclass(frozen=True, eq=False)
class HotHead:
    """A head of which sample pairs are wanted.

    Attributes:
        heads: This head alone.
        head: Which of its projection's it is.
        cells: Its cells, whose pairs are wanted.
    """

    heads: SweptHeads
    head: int
    cells: Sequence[Cell]

    @property
    def key(self) -> Key:
        """Which head it is."""
        one = self.heads.projection
        return one.layer, one.block, self.head


class HeldGradients:
    """The gradients of some heads, from one pass over the samples.

    Args:
        wanted: Whose.
        num_samples: Samples of the pass.
        device: Where they are held.
    """

    def __init__(self, wanted: Sequence[HotHead], num_samples: int, device: torch.device) -> None:
        self._heads = {one.key: one.heads for one in wanted}
        self._num_samples, self._device = num_samples, device
        self._gradients: dict[Key, Tensor] = {}
        self._seen = {key: torch.zeros(num_samples, dtype=torch.bool) for key in self._heads}

    @property
    def heads(self) -> list[SweptHeads]:
        """The heads."""
        return list(self._heads.values())

    def __contains__(self, head: HotHead) -> bool:
        return head.key in self._heads

    def take(self, first: int, step: CapturedStep) -> None:
        """Take the gradients of a step.

        Args:
            first: Place of its first sample among all.
            step: The step.
        """
        for key, heads in self._heads.items():
            if heads.projection.module_name not in step.factors:
                continue
            for start, block in heads.blocks(step, self._device):
                if key not in self._gradients:
                    self._gradients[key] = block.new_zeros(self._num_samples, heads.num_weights)
                rows = slice(first + start, first + start + len(block))
                self._gradients[key][rows], self._seen[key][rows] = block[:, 0], True

    def forget(self) -> None:
        """Give up the gradients of all heads."""
        self._heads.clear()
        self._gradients.clear()

    def pairs(self, head: HotHead, samples: ProbeSamples, settings: ScoreSettings) -> list[SamplePair]:
        """The sample pairs of the most harm in the cells of a head, whose gradients are then forgotten."""
        rows = self._seen[head.key].nonzero().flatten().tolist()
        tasks, ids, texts = (
            [values[row] for row in rows] for values in (samples.tasks, samples.ids, samples.texts)
        )
        own = self._gradients.pop(head.key)[rows]
        return pairs_of_head(head.heads.projection, head.cells, own, tasks, ids, texts, settings)
