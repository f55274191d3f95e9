"""Products of an input with a weight, in one form: tokens, input features, output features."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.nn import functional

MATMULS = (
    torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm,
)  # fmt: skip
CONVOLUTIONS = (torch.conv1d, torch.conv2d, functional.conv1d, functional.conv2d)
PRODUCTS = (
    *MATMULS, torch.einsum, functional.linear, torch.addmm, Tensor.addmm, torch.baddbmm, *CONVOLUTIONS,
)  # fmt: skip
"""Functions that multiply an input with a weight and add up over its features."""


@dataclass(frozen=True)
class Contraction:
    """A product as in ``einsum``: one letter for each axis of the input, the weight and the output."""

    input: str
    weight: str
    output: str

    @property
    def tokens(self) -> str:
        """Axes of the input that are still there in the output, and not in the weight."""
        return "".join(x for x in self.input if x in self.output and x not in self.weight)

    @property
    def contracted(self) -> str:
        """Axes of input features, in the weight's order."""
        return "".join(x for x in self.weight if x in self.input and x not in self.output)

    @property
    def free(self) -> str:
        """Axes of output features, in the weight's order."""
        return "".join(x for x in self.weight if x in self.output and x not in self.input)

    @property
    def shared(self) -> str:
        """Axes of input, weight and output alike: along them stand products of their own."""
        return "".join(x for x in self.weight if x in self.output and x in self.input)

    @property
    def is_linear_map(self) -> bool:
        """Whether every axis is one of these."""
        parts = self.tokens + self.contracted + self.free + self.shared
        return bool(self.contracted) and set(self.input + self.weight + self.output) == set(parts)

    def inputs(self, tensor: Shaped[Tensor, ...]) -> Shaped[Tensor, "*shared_token feature"]:
        """The input with its shared axes first and its features last, as one axis."""
        ordered = _permuted(tensor, self.input, self.shared + self.tokens + self.contracted)
        return ordered.flatten(-len(self.contracted))

    def outputs(self, tensor: Shaped[Tensor, ...]) -> Shaped[Tensor, "*shared_token feature"]:
        """The output in the same form."""
        ordered = _permuted(tensor, self.output, self.shared + self.tokens + self.free)
        return ordered.flatten(-len(self.free)) if self.free else ordered.unsqueeze(-1)

    def weights(self, tensor: Shaped[Tensor, ...]) -> Shaped[Tensor, "*shared input output"]:
        """The weight in the same form."""
        ordered = _permuted(tensor, self.weight, self.shared + self.contracted + self.free)
        ordered = ordered.flatten(-len(self.free)) if self.free else ordered.unsqueeze(-1)
        return ordered.flatten(len(self.shared), -2)

    def restored(self, features: Shaped[Tensor, "*shared_token feature"], like: Tensor) -> Tensor:
        """What ``outputs`` made, in the form of the output again."""
        order = self.shared + self.tokens + self.free
        sizes = dict(zip(self.output, like.shape, strict=True))
        return _permuted(features.reshape([sizes[x] for x in order]), order, self.output)

    def places(self, sizes: Sequence[int]) -> list[tuple[int, ...]]:
        """Every index along the shared axes."""
        return list(product(*map(range, sizes[: len(self.shared)])))


def _permuted(tensor: Tensor, letters: str, order: str) -> Tensor:
    return tensor.permute([letters.index(x) for x in order])


def read_product(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    is_weight: Callable[[object], bool],
) -> tuple[Tensor, Tensor, Contraction] | None:
    """Input, weight and form of a product with one weight, or None.

    Both come without axes that only stretch over the other one.
    """
    read = _read(func, args, kwargs, is_weight)
    if read is None:
        return None
    input, weight, form = read
    kept = [i for i in range(weight.ndim) if weight.stride(i) != 0 or weight.shape[i] == 1]
    if len(kept) < weight.ndim:  # expanded
        weight = weight[tuple(slice(None) if i in kept else 0 for i in range(weight.ndim))]
        form = Contraction(form.input, "".join(form.weight[i] for i in kept), form.output)
    return input, weight, form


def _read(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    is_weight: Callable[[object], bool],
) -> tuple[Tensor, Tensor, Contraction] | None:
    if func is functional.linear:
        input, weight = _named(args, kwargs, "input", "weight")
        if not is_weight(weight) or weight.ndim != 2:
            return None
        tokens = _letters(input.ndim - 1)
        return input, weight, Contraction(tokens + "i", "oi", tokens + "o")
    if func in CONVOLUTIONS:
        return _convolution(args, kwargs, is_weight)
    if func is torch.einsum:
        return _einsum(args, is_weight)
    if func in (torch.addmm, Tensor.addmm, torch.baddbmm):
        if kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1 or len(args) != 3:
            return None
        return _matmul(args[1], args[2], is_weight)
    first, second = _named(args, kwargs, "input", "mat2" if len(args) < 2 and "mat2" in kwargs else "other")
    return _matmul(first, second, is_weight)


def _named(args: Sequence[Any], kwargs: Mapping[str, Any], *names: str) -> list[Any]:
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


def _letters(number: int) -> str:
    return "".join(chr(ord("A") + i) for i in range(number))


def _matmul(
    first: Any, second: Any, is_weight: Callable[[object], bool]
) -> tuple[Tensor, Tensor, Contraction] | None:
    if is_weight(first) == is_weight(second) or min(first.ndim, second.ndim) < 2:
        return None
    num_batch = max(first.ndim, second.ndim) - 2
    batch = _letters(num_batch)
    sides = []
    for tensor, last in ((first, "xy"), (second, "yz")):
        own = batch[num_batch - (tensor.ndim - 2) :]
        sides.append((tensor, own + last))
    output = batch + "xz"
    (a, a_letters), (b, b_letters) = (_narrowed(*side) for side in sides)
    if is_weight(second):
        return a, b, Contraction(a_letters, b_letters, output)
    return b, a, Contraction(b_letters, a_letters, output)


def _narrowed(tensor: Tensor, letters: str) -> tuple[Tensor, str]:
    """Without batch axes of size 1, which stretch over the other operand's."""
    kept = [i for i, x in enumerate(letters) if x.islower() or tensor.shape[i] != 1]
    if len(kept) == len(letters):
        return tensor, letters
    return tensor[tuple(slice(None) if i in kept else 0 for i in range(len(letters)))], "".join(
        letters[i] for i in kept
    )


def _einsum(
    args: Sequence[Any], is_weight: Callable[[object], bool]
) -> tuple[Tensor, Tensor, Contraction] | None:
    operands = list(args[1]) if len(args) == 2 and isinstance(args[1], tuple | list) else list(args[1:])
    if not isinstance(args[0], str) or len(operands) != 2:
        return None
    if is_weight(operands[0]) == is_weight(operands[1]):
        return None
    equation = args[0].replace(" ", "")
    sides, arrow, output = equation.partition("->")
    letters = sides.split(",")
    if len(letters) != 2 or not arrow:
        return None
    ndims = [
        operand.ndim - len(own.replace("...", "")) for operand, own in zip(operands, letters, strict=True)
    ]
    free = [chr(0x3B1 + i) for i in range(max(ndims))]  # letters that no equation has
    letters = [
        own.replace("...", "".join(free[len(free) - n :] if n else []))
        for own, n in zip(letters, ndims, strict=True)
    ]
    output = output.replace("...", "".join(free))
    if any(len(set(own)) != len(own) for own in (*letters, output)):
        return None
    place = 1 if is_weight(operands[1]) else 0
    return operands[1 - place], operands[place], Contraction(letters[1 - place], letters[place], output)


def _convolution(
    args: Sequence[Any], kwargs: Mapping[str, Any], is_weight: Callable[[object], bool]
) -> tuple[Tensor, Tensor, Contraction] | None:
    input, weight, _, stride, padding, _, groups = _named(
        args, kwargs, "input", "weight", "bias", "stride", "padding", "dilation", "groups"
    )
    if not is_weight(weight) or math.prod(weight.shape[2:]) != 1 or groups not in (None, 1):
        return None
    if any(
        set(_tuple(value)) - {allowed} for value, allowed in ((stride, 1), (padding, 0)) if value is not None
    ):
        return None
    tokens = _letters(weight.ndim - 2)
    batch = "b" if input.ndim == weight.ndim else ""
    return input, weight.flatten(1), Contraction(f"{batch}i{tokens}", "oi", f"{batch}o{tokens}")


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
