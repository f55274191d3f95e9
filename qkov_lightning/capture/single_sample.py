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
        modules: Linear modules, and packed attention modules, by name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._added: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Add zeros to the weights that are not there. One forward pass."""
        self._added.clear()
        handles = [
            module.register_forward_hook(self._add(name), with_kwargs=True)
            for name, module in self._modules.items()
            if _own_weight(module) is None
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def of(self, loss: Tensor) -> dict[str, Float[Tensor, "d_out d_in"]]:
        """Weight gradients by module name, output features first, of the modules that the loss depends on."""
        leaves = {name: _own_weight(module) for name, module in self._modules.items()} | self._added
        known = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        gradients = torch.autograd.grad(loss, list(known.values()), allow_unused=True)
        return {
            name: gradient if name in self._added or _outputs_first(self._modules[name]) else gradient.T
            for name, gradient in zip(known, gradients, strict=True)
            if gradient is not None
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


def _own_weight(module: nn.Module) -> Tensor | None:
    packed = isinstance(module, nn.MultiheadAttention)
    weight = module._parameters.get("in_proj_weight" if packed else "weight")
    return weight if weight is not None and weight.requires_grad and weight.ndim == 2 else None


def _outputs_first(module: nn.Module) -> bool:
    """False for the Conv1D of GPT-2, which has no ``in_features``."""
    return isinstance(module, nn.MultiheadAttention) or hasattr(module, "in_features")
