"""The weight gradient of one sample alone, by ordinary autograd: what captured gradients must equal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from qkov_lightning.heads.maps import LinearMap, MapPart


def take_sample(batch: Any, index: int, num_samples: int) -> Any:
    """A batch of one: entry ``index`` of all that has one entry per sample, the rest as it is.

    Tensors are cut along their first dimension, lists and tuples of one entry per sample to that entry, and
    mappings, tuples and lists of such things part by part.

    >>> take_sample({"x": torch.arange(6).view(3, 2), "task": ["math", "code", "math"], "weight": 0.5}, 1, 3)
    {'x': tensor([[2, 3]]), 'task': ['code'], 'weight': 0.5}
    """
    if isinstance(batch, Tensor):
        return batch[index : index + 1] if batch.ndim and len(batch) == num_samples else batch
    if isinstance(batch, MutableMapping):
        single = copy.copy(batch)  # keeps the type: the encodings of tokenisers have attributes, too
        for key, value in batch.items():
            single[key] = take_sample(value, index, num_samples)
        return single
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        parts = [take_sample(value, index, num_samples) for value in batch]
        if not any(part is not value for part, value in zip(parts, batch, strict=True)):
            parts = [batch[index]] if len(batch) == num_samples else parts
        if isinstance(batch, tuple):
            return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
        return parts
    return batch


class WeightGradients:
    """Gradients of the weights of linear modules by autograd.

    Where a module has no weight of its own that trains (adapters, quantised or parametrised weights), the
    gradient of the effective weight: of a matrix of zeros that is added to it.

    Args:
        maps: Linear maps by name.
    """

    def __init__(self, maps: Mapping[str, LinearMap]) -> None:
        self._maps = maps
        self._parts = {part.name: part for one in maps.values() for part in one.parts}
        self._added: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Add zeros to the weights that are not there. One forward pass."""
        self._added.clear()
        handles = [
            part.module.register_forward_hook(self._add(name), with_kwargs=True)
            for name, part in self._parts.items()
            if _own_weight(part) is None and part.module is not None
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def of(self, loss: Tensor) -> dict[str, Float[Tensor, "d_out d_in"]]:
        """Weight gradients by map name, output features first, of the maps that the loss depends on."""
        leaves = {name: _own_weight(part) for name, part in self._parts.items()} | self._added
        known = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        gradients = torch.autograd.grad(loss, list(known.values()), allow_unused=True)
        by_part = {
            name: gradient if name in self._added else _outputs_first(self._parts[name], gradient)
            for name, gradient in zip(known, gradients, strict=True)
            if gradient is not None
        }
        return {
            name: torch.cat([by_part[part.name] for part in one.parts])
            for name, one in self._maps.items()
            if all(part.name in by_part for part in one.parts)
        }

    def _add(self, name: str) -> Callable[..., Tensor]:
        def hook(
            _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
        ) -> Tensor:
            activation = args[0] if args else next(iter(kwargs.values()))
            zeros = self._added.setdefault(
                name, output.new_zeros(output.shape[-1], activation.shape[-1], requires_grad=True)
            )
            return output + functional.linear(activation.to(output.dtype), zeros)

        return hook


def _own_weight(part: MapPart) -> Tensor | None:
    if part.module is None:
        return part.parameters[0]
    packed = isinstance(part.module, nn.MultiheadAttention)
    weight = part.module._parameters.get("in_proj_weight" if packed else "weight")
    is_whole = weight is not None and weight.numel() == part.num_inputs * part.num_outputs
    return weight if weight is not None and weight.requires_grad and weight.ndim > 1 and is_whole else None


def _outputs_first(part: MapPart, gradient: Tensor) -> Float[Tensor, "d_out d_in"]:
    if part.input_axes is not None:
        others = [axis for axis in range(gradient.ndim) if axis not in part.input_axes]
        gradient = gradient.permute(*others, *part.input_axes)
    elif part.module is not None and gradient.ndim == 2 and hasattr(part.module, "nf"):  # the Conv1D of GPT-2
        gradient = gradient.T
    return gradient.reshape(part.num_outputs, part.num_inputs)
