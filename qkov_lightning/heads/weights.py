"""The projections, seen from the parameters: which elements of which parameter a head owns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from qkov_lightning.heads.projections import Projection
from qkov_lightning.heads.shapes import ArchitectureError, linear_sizes


@dataclass(frozen=True)
class ProjectionWeight:
    """Where the weight of a projection is stored.

    Attributes:
        parameter_name: Dotted path of the weight inside the model.
        bias_name: Dotted path of the bias whose entries belong to heads; None without one, and for O, whose
            bias belongs to all heads together.
        axis: Axis of the weight that the heads' features index.
    """

    parameter_name: str
    bias_name: str | None
    axis: Literal[0, 1]


def find_weight(model: nn.Module, projection: Projection) -> ProjectionWeight:
    """Where the weight of a projection is stored.

    Args:
        model: Holds the projection.
        projection: Which one.

    Returns:
        Names and axis.

    Raises:
        ArchitectureError: If the weight is no parameter of its own, but computed from others (an adapter, a
            weight norm), or stored in another form (quantised).
    """
    where = f"Layer {projection.layer} (`{projection.layer_name}`), block {projection.block}"
    if projection.input_axes is not None or len(projection.map_names) > 1:
        raise ArchitectureError(
            f"{where}: `{projection.module_name}` is no linear module of its own, but a parameter that the attention uses "
            "itself, or several modules. Its gradients are measured, but its slices can be neither frozen nor projected: "
            "leave this layer out."
        )
    module = model.get_submodule(projection.module_name)
    own = dict(module.named_parameters(recurse=False))
    name = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
    if name not in own:
        held = [child for child, _ in module.named_parameters()]
        raise ArchitectureError(
            f"{where}: the weight of `{projection.module_name}` ({type(module).__name__}) is no parameter of its own, but "
            f"computed from {', '.join(held) or 'nothing that trains'}: changing one slice of it alone is not possible. "
            "Merge the adapter into its layer first, or leave this block out."
        )
    if isinstance(module, nn.MultiheadAttention):
        sizes = (module.embed_dim, 3 * module.embed_dim)
    else:
        sizes = linear_sizes(module)
    inputs_first = not isinstance(module, nn.MultiheadAttention) and not hasattr(module, "in_features")
    expected = sizes if inputs_first else sizes[::-1]
    if tuple(own[name].shape) != expected:
        raise ArchitectureError(
            f"{where}: the weight of `{projection.module_name}` has shape {tuple(own[name].shape)}, expected {expected}. "
            "Quantised and flattened weights have no slices."
        )
    is_output = projection.feature_axis == "output"
    axis: Literal[0, 1] = 0 if is_output != inputs_first else 1
    bias = name.replace("weight", "bias")
    prefix = f"{projection.module_name}." if projection.module_name else ""
    return ProjectionWeight(
        prefix + name, prefix + bias if is_output and own.get(bias) is not None else None, axis
    )


def by_head(
    values: Float[Tensor, "row column"], projection: Projection, weight: ProjectionWeight
) -> Float[Tensor, "head weight"]:
    """Values of a weight's shape, in the order of ``head_gradients``.

    The weights of a head are ordered (own feature, feature of the other side).
    """
    features: Int[Tensor, flat] = projection.head_features.flatten().to(values.device)
    own = values.index_select(weight.axis, features)
    return (own if weight.axis == 0 else own.T).reshape(projection.num_heads, -1)


def adaptive_rates(
    model: nn.Module, projection: Projection, optimizers: Sequence[Optimizer]
) -> Float[Tensor, "head weight"]:
    r"""What an optimiser of Adam's family multiplies a gradient with at the moment.

    .. math:: \rho = 1 / (\sqrt{v / (1 - \beta_2^t)} + \epsilon)

    with its second moments v after t steps (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1).

    Args:
        model: Holds the projection.
        projection: Which one.
        optimizers: Those of the training; one of them updates the projection's weight.

    Returns:
        The rates.

    Raises:
        ValueError: If no optimiser holds second moments of this weight, in its shape.
    """
    weight = find_weight(model, projection)
    parameter = model.get_parameter(weight.parameter_name)
    for optimizer in optimizers:
        state = optimizer.state.get(parameter, {})
        moments = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
        if moments is None or moments.shape != parameter.shape or hasattr(moments, "full_tensor"):
            continue
        group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        corrected = moments / (1 - group["betas"][1] ** float(state["step"]))
        return by_head(1 / (corrected.sqrt() + group["eps"]), projection, weight)
    names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
    raise ValueError(
        f"No optimiser ({names}) holds second moments (`exp_avg_sq`) of `{weight.parameter_name}` in its own shape, which "
        'update_direction="state" takes the direction from: use "auto", "adam" or "sgd" with this optimiser or strategy.'
    )


def local_part(tensor: Tensor, axis: int) -> tuple[Tensor, int]:
    """The part of a parameter that this process holds, and where it starts along an axis.

    Args:
        tensor: A whole tensor, or a sharded one (``DTensor``, as under FSDP2 and tensor parallelism).
        axis: Axis that the start is counted along.

    Returns:
        A view of the part, and its first index in the whole.

    Raises:
        ValueError: If an axis is sharded twice, or in pieces that are not contiguous.
    """
    if not isinstance(tensor, DTensor):
        return tensor, 0
    part, start, cuts = tensor.to_local(), 0, 0
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        if type(placement) is not Shard:
            raise ValueError(
                f"A weight is placed as {tensor.placements}, expected whole or cut into contiguous parts."
            )
        if placement.dim == axis:
            size = -(-tensor.shape[axis] // tensor.device_mesh.size(dimension))
            start = min(size * tensor.device_mesh.get_local_rank(dimension), tensor.shape[axis])
            cuts += 1
    if cuts > 1:
        raise ValueError(f"A weight is placed as {tensor.placements}, expected each axis cut once at most.")
    return part, start
