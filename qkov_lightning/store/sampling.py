r"""Sampled storage: a few weights of every head, drawn once, stand for all of them.

Every score is made of sums over the weights of a slice, :math:`\sum_k f_k`. A replicate draws m weights with
probabilities :math:`p_k`, and :math:`\sum_s f_{k_s} / (m p_{k_s})` is its unbiased estimate (Hansen & Hurwitz
1943), whatever p is. Draws are systematic (Madow 1949) along the head's own features, so that each of them
gets its share and few weights are drawn twice. The replicates are independent of each other: their spread is
the sampling error.

The probability of a weight is proportional to the product of the root mean squares of its output gradient and
its activation in the first captured step, which is what its gradient would be without any correlation between
the two.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qkov_lightning.capture.factors import CapturedStep, GradientFactors
from qkov_lightning.capture.gradients import owned_part
from qkov_lightning.capture.samples import Samples
from qkov_lightning.heads.projections import Projection

NUM_COORDINATES = 512
"""Weights of a head that are kept."""

NUM_REPLICATES = 8
"""Independent draws that they come from."""

FLOOR = 0.2
"""Share of each factor of the probabilities that is uniform: later steps may use what the first did not."""


@dataclass(frozen=True, eq=False)
class SliceSample:
    """Weights that were drawn from each head of a projection.

    Attributes:
        own: Feature among the head's own.
        other: Feature of the other side.
        weight: Inverse of the expected number of times that the weight is drawn, over all replicates.
        slice_size: Weights that a head has.
    """

    own: Int[Tensor, "head replicate coordinate"]
    other: Int[Tensor, "head replicate coordinate"]
    weight: Float[Tensor, "head replicate coordinate"]
    slice_size: int


@dataclass(frozen=True, eq=False)
class SampledStep:
    """What sampled storage keeps of a captured step.

    Attributes:
        samples: Who the samples are.
        scales: Factor per sample that turns its gradient into that of its own loss.
        num_terms: Terms that the own loss of each sample is the mean of.
        gradients: Gradients at the drawn weights, by name of the stored projection.
        fingerprint: Of the drawn weights.
    """

    samples: Samples
    scales: Float[Tensor, sample]
    num_terms: Float[Tensor, sample]
    gradients: Mapping[str, Float[Tensor, "sample head coordinate"]]
    fingerprint: int


class Coordinates:
    """The weights that were drawn, for all projections, samples and processes of a run.

    Args:
        slices: What was drawn from each projection, by ``stored_name``.
    """

    def __init__(self, slices: Mapping[str, SliceSample]) -> None:
        self.slices = dict(slices)
        parts = [part for name in sorted(self.slices) for part in _tensors(self.slices[name]).values()]
        self.fingerprint = 0
        for part in parts:
            self.fingerprint = zlib.crc32(part.contiguous().numpy().data, self.fingerprint)

    @classmethod
    def draw(
        cls,
        captured: Sequence[CapturedStep],
        projections: Sequence[Projection],
        *,
        num_coordinates: int = NUM_COORDINATES,
        num_replicates: int = NUM_REPLICATES,
        seed: int = 0,
    ) -> Coordinates:
        """Draw from every projection that was captured.

        Args:
            captured: The first captured step.
            projections: What is stored.
            num_coordinates: Weights per head; a head that has no more is kept whole.
            num_replicates: Independent draws that they come from.
            seed: Of the draws.

        Returns:
            The coordinates.
        """
        generator = torch.Generator().manual_seed(seed)
        slices = {}
        for projection in projections:
            own_square: Tensor | float = 0.0
            other_square: Tensor | float = 0.0
            for step in captured:
                if projection.module_name in step.factors:
                    part = owned_part(step.factors[projection.module_name], projection, step.scales)
                    if isinstance(part, GradientFactors):
                        own_square = own_square + part.grad_output.double().square().sum(dim=0)
                        other_square = other_square + part.activation.double().square().sum(dim=0)
            if isinstance(own_square, Tensor) and isinstance(other_square, Tensor):
                own = own_square.sqrt().view(projection.num_heads, projection.head_dim)
                slices[stored_name(projection)] = draw_slice(
                    own, other_square.sqrt(), generator, num_coordinates, num_replicates
                )
        return cls(slices)

    def sample(self, step: CapturedStep, projections: Sequence[Projection]) -> SampledStep:
        """The gradients of a step at the drawn weights, in the captured scale."""
        gradients = {}
        ones = torch.ones(len(step.samples), dtype=torch.float64)
        for projection in projections:
            drawn = self.slices.get(stored_name(projection))
            if drawn is not None and projection.module_name in step.factors:
                factors = step.factors[projection.module_name]
                part = owned_part(factors, projection, ones, factors.activation.device)
                if isinstance(part, GradientFactors):
                    gradients[stored_name(projection)] = sampled_gradients(part, drawn).cpu()
        return SampledStep(step.samples, step.scales, step.num_terms, gradients, self.fingerprint)

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of a safetensors file."""
        tensors = {
            f"{name}/{part}": tensor
            for name, drawn in self.slices.items()
            for part, tensor in _tensors(drawn).items()
        }
        sizes = {name: drawn.slice_size for name, drawn in self.slices.items()}
        return tensors, {"qkov_coordinates": json.dumps(sizes)}

    @classmethod
    def load(cls, path: Path) -> Coordinates:
        """Read a file that was made with ``to_file``.

        Raises:
            ValueError: If it is none.
        """
        try:
            with safe_open(path, framework="pt") as file:
                sizes = json.loads(file.metadata()["qkov_coordinates"])
                return cls({
                    name: SliceSample(
                        **{part: file.get_tensor(f"{name}/{part}") for part in ("own", "other", "weight")},
                        slice_size=int(size),
                    )
                    for name, size in sizes.items()
                })
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no coordinates: {error}") from error

    @property
    def description(self) -> dict[str, int | str]:
        """What the notes of a heatmap say of the sample."""
        example = max(self.slices.values(), key=lambda drawn: drawn.own[0].numel())
        return {
            "coordinates_per_head": example.own[0].numel(),
            "replicates": example.own.shape[1],
            "design": "systematic by feature, probability ~ rms output gradient x rms activation",
            "fingerprint": self.fingerprint,
        }


def sampled_bytes(projections: Sequence[Projection], itemsize: int = 4) -> int:
    """What a sample takes on disk at most, without its share of a header."""
    return itemsize * NUM_COORDINATES * sum(projection.num_heads for projection in projections)


def stored_name(projection: Projection) -> str:
    """Name under which sampled gradients of a projection are stored."""
    return f"layer {projection.layer} {projection.block}"


def stored_projection(projection: Projection) -> Projection:
    """The projection as if it were a module with one output per head, and one input per drawn weight."""
    heads = torch.arange(projection.num_heads).view(-1, 1)
    return Projection(stored_name(projection), projection.layer, projection.layer_name, "Q", heads)


def draw_slice(
    own: Float[Tensor, "head feature"],
    other: Float[Tensor, other],
    generator: torch.Generator,
    num_coordinates: int = NUM_COORDINATES,
    num_replicates: int = NUM_REPLICATES,
) -> SliceSample:
    """Draw weights of every head.

    Args:
        own: Size of the heads' own features, at least 0.
        other: Size of the features of the other side.
        generator: Source of the draws.
        num_coordinates: Weights per head; a head that has no more is taken whole, in one replicate.
        num_replicates: Independent draws.

    Returns:
        The sample.
    """
    num_heads, head_dim = own.shape
    slice_size = head_dim * len(other)
    if slice_size <= num_coordinates:
        every = torch.arange(slice_size).expand(num_heads, 1, slice_size)
        weight = torch.ones(num_heads, 1, slice_size)
        return SliceSample(every // len(other), every % len(other), weight, slice_size)
    per_replicate = num_coordinates // num_replicates
    own, other = _mixed(own), _mixed(other[None])[0]
    drawn = [
        [_systematic(row, other, per_replicate, generator) for _ in range(num_replicates)] for row in own
    ]
    rows = torch.stack([torch.stack([one[0] for one in head]) for head in drawn])
    columns = torch.stack([torch.stack([one[1] for one in head]) for head in drawn])
    expected = (
        num_replicates * per_replicate * own[torch.arange(num_heads)[:, None, None], rows] * other[columns]
    )
    return SliceSample(rows, columns, (1 / expected).float(), slice_size)


def _mixed(size: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch feature"]:
    """Probabilities proportional to the size, mixed with uniform ones."""
    total = size.double().sum(dim=-1, keepdim=True)
    uniform = torch.full_like(size, 1 / size.shape[-1], dtype=torch.float64)
    share = torch.where(total > 0, size.double() / total.clamp(min=torch.finfo(torch.float64).tiny), uniform)
    return FLOOR * uniform + (1 - FLOOR) * share


def _systematic(
    own: Float[Tensor, feature], other: Float[Tensor, other], count: int, generator: torch.Generator
) -> tuple[Int[Tensor, draw], Int[Tensor, draw]]:
    """Equidistant points on the line of all weights, each as long as its probability, in random order.

    Each own feature's weights are rotated by themselves, so that features of one length do not share their
    columns.
    """
    row_order = torch.randperm(len(own), generator=generator)
    column_order = torch.randperm(len(other), generator=generator)
    start = torch.rand((), generator=generator, dtype=torch.float64)
    rotation = torch.rand(len(own), generator=generator, dtype=torch.float64)
    points = (torch.arange(count, dtype=torch.float64) + start) / count
    ends = own[row_order].cumsum(0)
    position = torch.searchsorted(ends, points, right=True).clamp(max=len(own) - 1)
    rows = row_order[position]
    within = (points - (ends[position] - own[rows])) / own[rows]
    column_ends = other[column_order].cumsum(0)
    turned = (within + rotation[rows]) % 1
    columns = column_order[torch.searchsorted(column_ends, turned, right=True).clamp(max=len(other) - 1)]
    return rows, columns


def sampled_gradients(part: GradientFactors, drawn: SliceSample) -> Float[Tensor, "sample head coordinate"]:
    """Gradients at the drawn weights, from factors whose heads' side is ``grad_output``."""
    lengths = part.offsets.diff().tolist()
    own, other = part.grad_output.T.contiguous(), part.activation.T.contiguous()
    head_dim = own.shape[0] // drawn.own.shape[0]
    heads = []
    for head in range(drawn.own.shape[0]):
        rows = (head * head_dim + drawn.own[head].flatten()).to(own.device)
        products = own[rows].mul_(other[drawn.other[head].flatten().to(own.device)])
        heads.append(torch.stack([tokens.sum(dim=1) for tokens in products.split(lengths, dim=1)]))
    return torch.stack(heads, dim=1)


def _tensors(drawn: SliceSample) -> dict[str, Tensor]:
    return {"own": drawn.own.contiguous(), "other": drawn.other.contiguous(), "weight": drawn.weight}
