"""Which elements of which parameter a tensor holds, followed through everything that only moves them.

Attention code that holds its weights as parameters cuts, transposes and joins them before it multiplies with
them. Each of these steps is done a second time on a tensor of element numbers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

MOVES = frozenset({
    "view", "reshape", "permute", "transpose", "t", "movedim", "moveaxis", "swapaxes", "swapdims", "flatten",
    "unflatten", "squeeze", "unsqueeze", "expand", "expand_as", "__getitem__", "select", "narrow", "index_select",
    "split", "chunk", "unbind", "tensor_split", "cat", "concat", "concatenate", "stack", "vstack", "hstack",
    "repeat_interleave", "repeat", "view_as", "reshape_as", "adjoint", "__get__", "flip", "roll", "__iter__",
})  # fmt: skip
"""Functions that move elements and change none."""

KEEPS = frozenset({
    "contiguous", "clone", "detach", "to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda",
    "requires_grad_", "alias",
})  # fmt: skip
"""Functions that give the same elements, in another precision or place."""

PROPERTIES = ("T", "mT", "H", "mH", "data")


ELEMENTWISE = frozenset({
    "add", "radd", "iadd", "sub", "rsub", "isub", "subtract", "mul", "rmul", "imul", "multiply", "div", "divide",
    "truediv", "rtruediv", "itruediv", "true_divide", "pow", "maximum", "minimum", "where", "lerp", "addcmul", "addcdiv",
    "masked_fill", "setitem", "copy", "layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "prelu",
    "embedding", "eq", "ne", "lt", "gt", "le", "ge",
})  # fmt: skip
"""Functions of a weight that change each feature by itself, or all of them together."""


def mixes_nothing(func: Callable[..., Any], args: Iterable[Any], output: object) -> bool:
    """Whether a function leaves features apart: it moves them, or changes each by itself."""
    if not isinstance(output, Tensor) or not output.requires_grad or func.__name__ in MOVES | KEEPS:
        return True
    if func.__name__.strip("_") not in ELEMENTWISE:
        return False
    largest = max(
        (one.numel() for one in flat(args) if isinstance(one, Tensor) and one.requires_grad), default=0
    )
    # A weight that stretches an input over new places is half of a product.
    return output.numel() <= largest


class ParameterViews:
    """Element numbers of tensors that are made of parameters.

    Args:
        model: Holds the parameters.
        names: Those to follow.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.names: list[str] = []
        self.shapes: list[torch.Size] = []
        self._starts: list[int] = []
        self._numbers: dict[int, int] = {}
        self._followed: dict[int, tuple[Tensor, Tensor]] = {}
        self._computed: dict[int, Tensor] = {}
        self._constants = {id(buffer) for buffer in model.buffers()}
        total = 0
        for name in names:
            parameter = model.get_parameter(name)
            self._numbers[id(parameter)] = len(self.names)
            self.names.append(name)
            self.shapes.append(parameter.shape)
            self._starts.append(total)
            total += parameter.numel()

    def follow(self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        """Note the elements of what a function made, if it moves or keeps those of a parameter."""
        name = func.__name__
        tensors = [one for one in flat((*args, *kwargs.values())) if isinstance(one, Tensor)]
        if not any(self.is_known(one) or id(one) in self._computed for one in tensors):
            return
        is_property = name == "__get__" and any(func == getattr(Tensor, p).__get__ for p in PROPERTIES)
        if (name not in MOVES and name not in KEEPS and not is_property) or any(
            map(self.is_computed, tensors)
        ):
            self._note_computed(tensors, output)
            return
        if name in KEEPS:
            known = self.elements(args[0])
            if isinstance(output, Tensor) and known is not None and known.shape == output.shape:
                self._note(output, known)
            return
        moved = func(*_replaced(args, self._numbered), **_replaced(dict(kwargs), self._numbered))
        outputs = output if isinstance(output, tuple | list) else [output]
        for own, numbers in zip(outputs, moved if isinstance(moved, tuple | list) else [moved], strict=False):
            if isinstance(own, Tensor) and own.is_floating_point() and own.shape == numbers.shape:
                self._note(own, numbers)

    def elements(self, tensor: object) -> Int[Tensor, ...] | None:
        """Number of each element, counted through all parameters; -1 for others. None if none is known."""
        if not isinstance(tensor, Tensor):
            return None
        number = self._numbers.get(id(tensor))
        if number is not None:
            start = self._starts[number]
            return torch.arange(start, start + tensor.numel()).view(tensor.shape)
        known = self._followed.get(id(tensor))
        return None if known is None or known[0] is not tensor else known[1]

    def name_of(self, tensor: Tensor) -> str | None:
        """Name of the parameter that a tensor is, if it is one."""
        number = self._numbers.get(id(tensor))
        return None if number is None else self.names[number]

    def owner(self, element: int) -> int:
        """Which parameter an element is of."""
        return bisect_right(self._starts, element) - 1

    def start(self, number: int) -> int:
        """The first element of a parameter."""
        return self._starts[number]

    def is_computed(self, value: object) -> bool:
        """Whether a tensor was computed from parameters alone."""
        return isinstance(value, Tensor) and self._computed.get(id(value)) is value

    def _note_computed(self, tensors: Sequence[Tensor], output: object) -> None:
        """Note what was made of nothing but parameters, buffers, numbers and indices."""
        for value in output if isinstance(output, tuple | list) else (output,):
            is_matrix = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
            if is_matrix and all(self._is_weight_like(one) for one in tensors):
                self._computed[id(value)] = value

    def _is_weight_like(self, tensor: Tensor) -> bool:
        return (
            self.is_known(tensor)
            or self.is_computed(tensor)
            or id(tensor) in self._constants
            or not tensor.is_floating_point()
            or tensor.ndim == 0
        )

    def forget(self) -> None:
        """Let the followed tensors go."""
        self._followed.clear()
        self._computed.clear()

    def is_known(self, value: object) -> bool:
        """Whether a tensor holds elements of parameters."""
        return isinstance(value, Tensor) and (id(value) in self._numbers or id(value) in self._followed)

    def _note(self, tensor: Tensor, numbers: Tensor) -> None:
        self._followed[id(tensor)] = (tensor, numbers)

    def _numbered(self, tensor: Tensor) -> Tensor:
        known = self.elements(tensor)
        if known is not None:
            return known
        return torch.full(tensor.shape, -1) if tensor.is_floating_point() else tensor.cpu()


def flat(values: Iterable[Any]) -> list[Any]:
    """The values, and those inside of tuples and lists."""
    found: list[Any] = []
    for value in values:
        found += flat(value) if isinstance(value, tuple | list) else [value]
    return found


def _replaced(values: Any, by: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(values, Tensor):
        return by(values)
    if isinstance(values, dict):
        return {key: _replaced(value, by) for key, value in values.items()}
    if isinstance(values, tuple | list) and not isinstance(values, torch.Size):
        return type(values)(_replaced(value, by) for value in values)
    return values
