"""The parts of a heatmap: layers and their blocks, cells, and sample pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qkov_lightning.heads.projections import Block
from qkov_lightning.measure.names import readable

Status = Literal["measured", "frozen", "no data"]


@dataclass(frozen=True)
class BlockInfo:
    """Where one block of one layer lives, and whether it was measured.

    Attributes:
        module_name: Module that holds the projection.
        num_heads: Heads of this block itself.
        query_group: Query heads that share one of these heads.
        status: "measured", "frozen" (nothing in the module trains) or "no data".
        also: Other blocks that the very same features are, which have no cells of their own.
    """

    module_name: str
    num_heads: int
    query_group: int
    status: Status
    also: tuple[Block, ...] = ()


@dataclass(frozen=True)
class Layer:
    """One attention layer.

    Attributes:
        name: Label.
        blocks: The blocks that were placed.
        placed: How its heads are known: "proven", or "by name" and why they are not proven.
    """

    name: str
    blocks: Mapping[Block, BlockInfo]
    placed: str = "by name"


@dataclass(frozen=True)
class Cell:
    """One (layer, head, block) with one score of one task pair.

    Attributes:
        task_a: Task whose sensitivity is measured.
        task_b: Task that pushes.
        layer: Position of the layer.
        layer_name: Label of the layer.
        head: Head, counted within the block.
        block: "Q", "K", "V" or "O".
        value: The score.
        standard_error: Its standard error over samples.
    """

    task_a: str
    task_b: str
    layer: int
    layer_name: str
    head: int
    block: Block
    value: float
    standard_error: float

    @property
    def name(self) -> str:
        """Short name, as in ``L15.H8.O``."""
        return f"L{self.layer}.H{self.head}.{self.block}"


@dataclass(frozen=True)
class SamplePair:
    """Two samples that interfere in a cell: ``sample_b`` of ``task_b`` hurts ``sample_a`` of ``task_a``.

    Attributes:
        task_a: Task of the sample that is hurt.
        sample_a: Its identifier.
        task_b: Task of the sample that pushes.
        sample_b: Its identifier.
        layer: Position of the layer.
        head: Head, counted within the block.
        block: "Q", "K", "V" or "O".
        value: Their interference, which has no sign.
        harm: Rise of the loss of the first when one step is taken along the gradient of the second in this
            cell; below 0 it falls; None in heatmaps that do not know it.
        text_a: Text of the first, if texts are kept.
        text_b: Text of the second.
    """

    task_a: str
    sample_a: str
    task_b: str
    sample_b: str
    layer: int
    head: int
    block: Block
    value: float
    harm: float | None = None
    text_a: str | None = None
    text_b: str | None = None

    @property
    def name(self) -> str:
        """Short name of the cell, as in ``L15.H8.O``."""
        return f"L{self.layer}.H{self.head}.{self.block}"

    def __str__(self) -> str:
        verb = "interferes with" if self.harm is None else "hurts" if self.harm > 0 else "helps"
        a, b = readable(self.task_a), readable(self.task_b)
        return f"{b} sample {self.sample_b} {verb} {a} sample {self.sample_a} in {self.name}"
