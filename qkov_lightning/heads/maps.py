"""What the name of a projection stands for: a linear module, a parameter, or several of them side by side."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from qkov_lightning.heads.projections import Projection
from qkov_lightning.heads.shapes import is_linear, is_pointwise_convolution, linear_sizes


@dataclass(frozen=True, eq=False)
class MapPart:
    """One linear map.

    Attributes:
        name: The module, or the parameter.
        module: The module; None for a parameter.
        parameters: What it computes with.
        num_inputs: Input features.
        num_outputs: Output features.
        container: Path of the module whose forward pass uses it without calling a module; None where a module
            of its own is called.
        input_axes: Of a parameter: its axes that are input features.
    """

    name: str
    module: nn.Module | None
    parameters: tuple[nn.Parameter, ...]
    num_inputs: int
    num_outputs: int
    container: str | None = None
    input_axes: tuple[int, ...] | None = None

    @property
    def is_trainable(self) -> bool:
        """Whether anything in it trains (for a LoRA wrapper: its adapters)."""
        return any(parameter.requires_grad for parameter in self.parameters)


@dataclass(frozen=True, eq=False)
class LinearMap:
    """What one projection is computed by.

    Attributes:
        name: That of the projection.
        parts: One linear map, or several whose output features (of O: input features) are counted on.
    """

    name: str
    parts: tuple[MapPart, ...]

    @property
    def is_trainable(self) -> bool:
        """Whether any part trains."""
        return any(part.is_trainable for part in self.parts)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """What it computes with."""
        return tuple(parameter for part in self.parts for parameter in part.parameters)

    @property
    def num_inputs(self) -> int:
        """Input features."""
        return self.parts[0].num_inputs

    @property
    def num_outputs(self) -> int:
        """Output features of all parts."""
        return sum(part.num_outputs for part in self.parts)

    @property
    def starts(self) -> dict[str, int]:
        """The first output feature of each part."""
        starts, start = {}, 0
        for part in self.parts:
            starts[part.name] = start
            start += part.num_outputs
        return starts


def find_map(model: nn.Module, projection: Projection) -> LinearMap:
    """What a projection is computed by.

    Raises:
        AttributeError: If the model has no such module or parameter.
    """
    return LinearMap(
        projection.module_name,
        tuple(_part(model, name, projection.input_axes) for name in projection.map_names),
    )


def _part(model: nn.Module, name: str, input_axes: tuple[int, ...] | None) -> MapPart:
    if input_axes is not None:
        parameter = model.get_parameter(name)
        inputs = math.prod(parameter.shape[axis] for axis in input_axes)
        container = name.rpartition(".")[0]
        if is_map(model.get_submodule(container)):  # used by the module around it
            container = container.rpartition(".")[0]
        return MapPart(name, None, (parameter,), inputs, parameter.numel() // inputs, container, input_axes)
    module = model.get_submodule(name)
    if isinstance(
        module, nn.MultiheadAttention
    ):  # the packed weight; its output projection is a module of its own
        return MapPart(name, module, (module.in_proj_weight,), module.embed_dim, 3 * module.embed_dim, name)
    around = name.rpartition(".")[0]
    is_inside = bool(name) and isinstance(model.get_submodule(around), nn.MultiheadAttention)
    return MapPart(
        name, module, tuple(module.parameters()), *linear_sizes(module), around if is_inside else None
    )


def widened(
    tensor: Shaped[Tensor, "*token own"], features: Int[Tensor, own], width: int
) -> Shaped[Tensor, "*token feature"]:
    """A tensor with a column for each of ``width`` features, zero where it has none; itself if it has all.

    Args:
        tensor: Some features.
        features: Which ones they are.
        width: How many there are.
    """
    if len(features) == width and torch.equal(features, torch.arange(width)):
        return tensor
    wide = tensor.new_zeros(*tensor.shape[:-1], width)
    return wide.index_copy(-1, features.to(tensor.device), tensor)


def is_map(module: nn.Module) -> bool:
    """Whether a call of the module is one linear map of its input."""
    if is_pointwise_convolution(module):
        return True
    return is_linear(module) and (hasattr(module, "weight") or hasattr(module, "base_layer"))


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, nothing trainable, eager, with random numbers of its own; all restored afterwards."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    held = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    tensors = {
        id(t): t for _, own, buffers in held for t in (*own.values(), *buffers.values()) if _is_state(t)
    }
    values = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(0)
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
        for module, attributes, buffers in held:
            module._buffers.update(buffers)
            for name, value in attributes.items():
                if vars(module).get(name) is not value:
                    vars(module)[name] = value
        with torch.no_grad():
            for tensor, before in values:
                if tensor.grad_fn is not None:  # written in place by what has a gradient here
                    tensor.detach_()
                if not torch.equal(tensor, before):
                    tensor.copy_(before)


def _is_state(value: object) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
