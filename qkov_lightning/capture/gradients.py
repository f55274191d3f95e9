"""From captured factors to per-sample gradients of attention heads: pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qkov_lightning.capture.factors import GradientFactors
from qkov_lightning.heads.projections import Projection

BLOCK_BYTES = 64 * 2**20
"""Per-sample gradients that are in memory at once where they are only summed."""


@dataclass(frozen=True, eq=False)
class DenseGradients:
    """Per-sample gradients of a whole weight, for projections where that is smaller than the factors.

    Attributes:
        gradient: Gradient of each sample with respect to the weight, output features first,
            in the captured scale.
    """

    gradient: Float[Tensor, "sample d_out d_in"]


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float32, or float64 where the training itself ran in float64."""
    return torch.promote_types(dtype, torch.float32)


def _per_sample(
    tokens: Float[Tensor, "token feature"], lengths: list[int]
) -> Float[Tensor, "sample time feature"]:
    """Tokens of each sample, padded with zeros, which add nothing to an outer product."""
    if len(set(lengths)) == 1:
        return tokens.view(len(lengths), lengths[0], tokens.shape[-1])
    return torch.nn.utils.rnn.pad_sequence(list(tokens.split(lengths)), batch_first=True)


def _outer_products(
    left: Float[Tensor, "token left"],
    right: Float[Tensor, "token right"],
    offsets: Int[Tensor, edge],
    out: Float[Tensor, "sample left right"] | None = None,
) -> Float[Tensor, "sample left right"]:
    lengths = offsets.diff().tolist()
    dtype = _compute_dtype(torch.promote_types(left.dtype, right.dtype))
    left_time = _per_sample(left.to(dtype), lengths)
    return torch.bmm(left_time.transpose(1, 2), _per_sample(right.to(dtype), lengths), out=out)


def dense_gradients(factors: GradientFactors) -> DenseGradients:
    r"""Weight gradient of each sample.

    .. math:: G_n = \sum_t \delta_{nt} a_{nt}^\top

    over the tokens t of sample n, with output gradient :math:`\delta` and activation :math:`a`
    (Goodfellow 2015, arXiv:1510.01799, before the norm is taken).
    """
    return DenseGradients(_outer_products(factors.grad_output, factors.activation, factors.offsets))


def select_samples(
    source: GradientFactors | DenseGradients, start: int, stop: int
) -> GradientFactors | DenseGradients:
    """The samples ``start`` to ``stop - 1``."""
    if isinstance(source, DenseGradients):
        return DenseGradients(source.gradient[start:stop])
    offsets = source.offsets[start : stop + 1]
    tokens = slice(int(offsets[0]), int(offsets[-1]))
    return GradientFactors(source.activation[tokens], source.grad_output[tokens], offsets - offsets[0])


@overload
def owned_part(
    source: GradientFactors,
    projection: Projection,
    sample_scale: Float[Tensor, sample],
    device: torch.device | str = "cpu",
) -> GradientFactors: ...


@overload
def owned_part(
    source: GradientFactors | DenseGradients,
    projection: Projection,
    sample_scale: Float[Tensor, sample],
    device: torch.device | str = "cpu",
) -> GradientFactors | DenseGradients: ...


def owned_part(
    source: GradientFactors | DenseGradients,
    projection: Projection,
    sample_scale: Float[Tensor, sample],
    device: torch.device | str = "cpu",
) -> GradientFactors | DenseGradients:
    """What the heads own of a module, ready for arithmetic.

    Args:
        source: What the cache holds for the module of ``projection``.
        projection: Says which features the heads own.
        sample_scale: Factor that undoes loss averaging, accumulation and gradient scaling; applied
            in float32 or better, before anything is squared.
        device: Where the arithmetic runs.

    Returns:
        Factors or gradients of each sample's own loss, in float32 or better. The heads' side comes first:
        ``grad_output`` holds the heads' own features, ``activation`` those of the other side, also for O.

    Raises:
        ValueError: If the projection names a feature that the module does not have.
    """
    flat = projection.head_features.flatten()
    axis_size = _axis_size(source, projection)
    if int(flat.max()) >= axis_size:
        raise ValueError(
            f"Layer {projection.layer} (`{projection.layer_name}`): block {projection.block} claims feature "
            f"{int(flat.max())} of `{projection.module_name}`, which has {axis_size} {projection.feature_axis} "
            "features. Check the number of heads and the head size."
        )
    if isinstance(source, DenseGradients):
        own_axis = 2 if projection.block == "O" else 1
        gradient = source.gradient.index_select(own_axis, flat.to(source.gradient.device)).to(device)
        gradient = gradient.transpose(1, 2) if projection.block == "O" else gradient
        gradient = gradient.to(_compute_dtype(gradient.dtype))
        return DenseGradients(gradient * sample_scale.to(gradient)[:, None, None])
    own, other = source.grad_output, source.activation
    if projection.block == "O":
        own, other = other, own
    dtype = _compute_dtype(torch.promote_types(own.dtype, other.dtype))
    own = own.index_select(1, flat.to(own.device)).to(device).to(dtype)
    scale = sample_scale.repeat_interleave(source.offsets.diff().cpu()).to(own)
    return GradientFactors(other.to(device).to(dtype), own * scale[:, None], source.offsets)


def head_gradients(
    source: GradientFactors | DenseGradients,
    projection: Projection,
    sample_scale: Float[Tensor, sample],
) -> Float[Tensor, "sample head weight"]:
    """Per-sample gradient of every weight that the heads own.

    Args:
        source: What the cache holds for the module of ``projection``.
        projection: Says which features the heads own.
        sample_scale: Factor that undoes loss averaging, accumulation and gradient scaling.

    Returns:
        Gradients of each sample's own loss, in loss per unit of weight. The weights of a head are
        ordered (own feature, feature of the other side), for Q, K, V and O alike.

    Raises:
        ValueError: If the projection names a feature that the module does not have.
    """
    gradient = owned_gradients(owned_part(source, projection, sample_scale))
    return gradient.reshape(len(gradient), projection.num_heads, -1)


def owned_gradients(
    part: GradientFactors | DenseGradients, out: Float[Tensor, "sample own other"] | None = None
) -> Float[Tensor, "sample own other"]:
    """Gradients of an ``owned_part``, written to ``out`` if there is one."""
    if isinstance(part, DenseGradients):
        return part.gradient if out is None else out.copy_(part.gradient)
    return _outer_products(part.grad_output, part.activation, part.offsets, out)


def gradient_blocks(
    part: GradientFactors | DenseGradients, num_heads: int
) -> Iterator[tuple[int, Float[Tensor, "sample head weight"]]]:
    """Gradients of an ``owned_part``, a few samples at a time, and the first of these."""
    if isinstance(part, DenseGradients):
        num_samples, num_weights = len(part.gradient), part.gradient[0].numel()
    else:
        num_samples = len(part.offsets) - 1
        num_weights = part.grad_output.shape[1] * part.activation.shape[1]
    together = max(1, BLOCK_BYTES // (num_weights * 4))
    for start in range(0, num_samples, together):
        some = select_samples(part, start, min(start + together, num_samples))
        gradients = owned_gradients(some)
        yield start, gradients.view(len(gradients), num_heads, -1)


def num_other_features(part: GradientFactors | DenseGradients) -> int:
    """Features on the side of the module that the heads do not own, of an ``owned_part``."""
    return (part.gradient if isinstance(part, DenseGradients) else part.activation).shape[-1]


def _axis_size(source: GradientFactors | DenseGradients, projection: Projection) -> int:
    if isinstance(source, DenseGradients):
        return source.gradient.shape[2 if projection.block == "O" else 1]
    return (source.activation if projection.block == "O" else source.grad_output).shape[1]
