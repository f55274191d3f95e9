"""Sight of every linear map of a model while it runs, whether a module is called for it or not.

A linear map is a module (``nn.Linear`` and what wraps it, a convolution of size 1), or a product of an input
with a parameter: ``functional.linear``, ``matmul``, ``einsum``, and what ``torch.nn.MultiheadAttention`` does
inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from qkov_lightning.heads.contraction import PRODUCTS, Contraction, read_product
from qkov_lightning.heads.maps import widened
from qkov_lightning.heads.parameter_views import ParameterViews, flat, mixes_nothing
from qkov_lightning.heads.shapes import is_pointwise_convolution

# The same code, but visible to a mode: the original hands itself over to the mode as a whole, once and again.
_attention = functional.multi_head_attention_forward
_open_attention = FunctionType(
    _attention.__code__,
    {**vars(functional), "has_torch_function": lambda _: False},
    argdefs=_attention.__defaults__,
)


@dataclass(frozen=True, eq=False)
class Piece:
    """The part of a linear map that some columns of a product are.

    Attributes:
        name: The module, or the parameter.
        columns: Output features of the product that belong to it.
        shape: Sizes of the parameter's axes; of a module, those of its outputs and inputs.
        outputs: Index of each column's weights in the parameter, -1 along the axes that differ within a
            column.
        inputs: The same of each input feature.
    """

    name: str
    columns: Int[Tensor, column]
    shape: tuple[int, ...]
    outputs: Int[Tensor, "column axis"]
    inputs: Int[Tensor, "input axis"]

    @property
    def axes_of_inputs(self) -> tuple[int, ...]:
        """Axes of the parameter that are input features in this product."""
        return tuple(i for i in range(len(self.shape)) if int(self.outputs[0, i]) < 0)

    @property
    def axes_of_outputs(self) -> tuple[int, ...]:
        """Axes of the parameter that are output features in this product."""
        return tuple(i for i in range(len(self.shape)) if int(self.inputs[0, i]) < 0)

    def output_features(self, input_axes: Collection[int]) -> Int[Tensor, column]:
        """Feature that each column is, of all axes that are not input features."""
        return _raveled(self.outputs, self.shape, [i for i in range(len(self.shape)) if i not in input_axes])

    def input_features(self, input_axes: Collection[int]) -> Int[Tensor, input]:
        """Feature that each input is, of the axes that are input features."""
        return _raveled(self.inputs, self.shape, sorted(input_axes))


def _raveled(
    index: Int[Tensor, "feature axis"], shape: Sequence[int], axes: Sequence[int]
) -> Int[Tensor, feature]:
    features = torch.zeros(len(index), dtype=torch.int64)
    for axis in axes:
        features = features * shape[axis] + index[:, axis]
    return features


@dataclass(frozen=True, eq=False)
class Product:
    """One use of linear maps: an input, and an output of the maps that stand side by side in it.

    Attributes:
        activation: The input, samples first and features last.
        output: The output, likewise.
        pieces: What its columns are.
    """

    activation: Shaped[Tensor, "... input"]
    output: Shaped[Tensor, "... output"]
    pieces: tuple[Piece, ...]


OnProducts = Callable[[Sequence[Product]], Sequence[Tensor | None]]
"""Called for the products of one call; gives the outputs to go on with, or None to leave one."""


def whole_module(name: str, activation: Tensor, output: Tensor) -> Product:
    """The product that a linear module is."""
    return Product(activation, output, (_whole_piece(name, output.shape[-1], activation.shape[-1]),))


@lru_cache(maxsize=4096)
def _whole_piece(name: str, num_outputs: int, num_inputs: int) -> Piece:
    outputs, inputs = (torch.full((size, 2), -1) for size in (num_outputs, num_inputs))
    outputs[:, 0], inputs[:, 1] = torch.arange(num_outputs), torch.arange(num_inputs)
    return Piece(name, torch.arange(num_outputs), (num_outputs, num_inputs), outputs, inputs)


def whole_input(
    products: Sequence[Product], name: str, axes: Collection[int], width: int
) -> Shaped[Tensor, "... feature"] | None:
    """The input of a map, with a column for each feature that it has, from products that use some each.

    Args:
        products: Those of one call, or of several calls of one parameter.
        name: The map.
        axes: Axes of its weight that are input features.
        width: Its input features.
    """
    whole: Tensor | None = None
    for product in products:
        own = next((piece for piece in product.pieces if piece.name == name), None)
        if own is not None:
            wide = widened(product.activation, own.input_features(axes), width)
            whole = wide if whole is None else whole + wide
    return whole


def features_last(module: nn.Module, tensor: Tensor) -> Tensor:
    """An input or output of a linear module; of a convolution with its channels last."""
    if not is_pointwise_convolution(module):
        return tensor
    return tensor.movedim(1 if tensor.ndim == module.weight.ndim else 0, -1)


def on_call(name: str, module: nn.Module, on_products: OnProducts) -> Callable[..., Tensor | None]:
    """A forward hook, with keywords, for a linear module."""

    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Tensor | None:
        activation = args[0] if args else next(iter(kwargs.values()))
        sides = [features_last(module, t) for t in (activation, output)]
        (seen,) = on_products([whole_module(name, *sides)])
        if seen is None or sides[1] is output:
            return seen
        return seen.movedim(-1, 1 if output.ndim == module.weight.ndim else 0)

    return hook


class MapWatcher(TorchFunctionMode):
    """While active, shows the products with parameters that no linear module is called for.

    An active mode also keeps PyTorch from taking the fused inference path of its own attention.

    Args:
        model: Holds the parameters.
        on_products: Called for the products of each call.
        parameters: Names of the maps to look at; all of them without.
    """

    def __init__(
        self, model: nn.Module, on_products: OnProducts, parameters: Collection[str] | None = None
    ) -> None:
        super().__init__()
        self._aliases = _aliases(model)
        names = (name for name, _ in model.named_parameters())
        if parameters is not None:
            names = (name for name in names if self._aliases.get(name, name) in parameters)
        self._views = ParameterViews(model, names)
        self._on_products = on_products
        self._num_samples: list[int] = []
        self._inside = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward:
            query: Tensor = args[0]
            self._num_samples.append(query.shape[1] if query.ndim == 3 else 1)
            try:
                with self:
                    return _open_attention(*args, **kwargs)
            finally:
                self._num_samples.pop()
        output = func(*args, **kwargs)
        if self._inside:
            return output
        if func in PRODUCTS:
            return self._multiplied(func, args, kwargs, output)
        self._views.follow(func, args, kwargs, output)
        if not mixes_nothing(func, args, output) and self._has_weight((*args, *kwargs.values())):
            return self._mixed(output, args)
        return output

    def _has_weight(self, values: Iterable[Any]) -> bool:
        """Whether a matrix of parameters, or of what is computed from them, is among the values."""
        return any(
            one.ndim > 1 and (self._views.is_known(one) or self._views.is_computed(one))
            for one in flat(values)
            if isinstance(one, Tensor)
        )

    def _mixed(self, output: Any, args: Any) -> Any:  # noqa: ARG002
        """What becomes of the result of a function that may mix features, and is no product."""
        return output

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if not self._num_samples:
            self._views.forget()

    def _multiplied(
        self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], output: Tensor
    ) -> Tensor:
        if func is functional.linear:  # learned queries are a parameter, too
            args, kwargs = (*args, *(kwargs[name] for name in ("input", "weight")[len(args) :]))[:2], {}
            name = self._views.name_of(args[1])
            if name is not None and args[1].ndim == 2:  # the usual case, without a look at every element
                piece = _whole_piece(self._aliases.get(name, name), *args[1].shape)
                product = Product(self._sample_first(args[0]), self._sample_first(output), (piece,))
                (seen,) = self._on_products([product])
                return output if seen is None else self._as_found(seen, output).contiguous()
            numbered = [None, self._views.elements(args[1])]
        else:
            numbered = [self._views.elements(value) for value in args]
        if func is torch.einsum and len(args) == 2 and isinstance(args[1], tuple | list):
            args = (args[0], *args[1])
            numbered = [self._views.elements(value) for value in args]
        named = {key: self._views.elements(value) for key, value in kwargs.items()}
        weights = [one for one in (*numbered, *named.values()) if one is not None and one.ndim > 1]
        if not weights:
            return self._computed(func, args, kwargs, output)

        def is_weight(value: object) -> bool:
            return any(value is one for one in weights)

        placed = [value if one is None else one for value, one in zip(args, numbered, strict=True)]
        by_name = {key: kwargs[key] if one is None else one for key, one in named.items()}
        read = read_product(func, placed, by_name, is_weight)
        if read is None or not read[2].is_linear_map or output.ndim != len(read[2].output):
            return self._mixed(output, args)
        return self._shown(*read, output)

    def _computed(
        self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], output: Tensor
    ) -> Tensor:
        """A product with a weight that is computed from parameters: its features are nobody's."""
        self._views.follow(func, args, kwargs, output)
        read = read_product(func, args, kwargs, self._views.is_computed)
        if read is None or not read[2].is_linear_map or output.ndim != len(read[2].output):
            return self._mixed(output, args) if self._has_weight((*args, *kwargs.values())) else output
        input, weight, form = read
        return self._shown(input, torch.full(weight.shape, -1), form, output)

    def _shown(self, input: Tensor, elements: Tensor, form: Contraction, output: Tensor) -> Tensor:
        activation, features = form.inputs(input), form.outputs(output)
        matrix = form.weights(elements)
        products = []
        for place in form.places(features.shape):
            pieces = tuple(self._pieces(matrix[place]))
            products.append(
                Product(self._sample_first(activation[place]), self._sample_first(features[place]), pieces)
            )
        seen = self._on_products(products)
        if all(one is None for one in seen):
            return output
        parts = [
            self._as_found(product.output if one is None else one, features[place])
            for product, one, place in zip(products, seen, form.places(features.shape), strict=True)
        ]
        joined = torch.stack(parts).view(features.shape) if form.shared else parts[0]
        return form.restored(joined, output).contiguous()

    def _sample_first(self, tensor: Tensor) -> Tensor:
        """PyTorch's attention works time first, and flattens time and samples before its output."""
        if not self._num_samples:
            return tensor
        return tensor.reshape(-1, self._num_samples[-1], tensor.shape[-1]).transpose(0, 1)

    def _as_found(self, tensor: Tensor, like: Tensor) -> Tensor:
        return tensor.transpose(0, 1).reshape(like.shape) if self._num_samples else tensor

    def _pieces(self, elements: Int[Tensor, "input output"]) -> Iterator[Piece]:
        """The parameters that columns of a weight are of, without columns of none or of several."""
        known = (elements >= 0).all(dim=0).tolist()
        owners = [
            self._views.owner(int(e)) if is_known else -1
            for e, is_known in zip(elements[0], known, strict=True)
        ]
        for number in dict.fromkeys(owner for owner in owners if owner >= 0):
            name, shape = self._views.names[number], self._views.shapes[number]
            columns = torch.tensor([i for i, owner in enumerate(owners) if owner == number])
            own = elements[:, columns] - self._views.start(number)
            is_grid = torch.equal(own, own[:, :1] + own[:1] - own[0, 0])
            if not is_grid or int(own.min()) < 0 or int(own.max()) >= math.prod(shape):
                continue
            inputs, outputs = _index(own[:, 0], shape), _index(own[0], shape)
            along_inputs = [i for i in range(len(shape)) if len(inputs[:, i].unique()) > 1]
            along_outputs = [i for i in range(len(shape)) if len(outputs[:, i].unique()) > 1]
            repeats = len(own[0].unique()) < own.shape[1] or len(own[:, 0].unique()) < len(own)
            if repeats or set(along_inputs) & set(along_outputs):
                continue
            outputs[:, along_inputs], inputs[:, along_outputs] = -1, -1
            yield Piece(self._aliases.get(name, name), columns, tuple(shape), outputs, inputs)


def _index(elements: Int[Tensor, element], shape: Sequence[int]) -> Int[Tensor, "element axis"]:
    return torch.stack(torch.unravel_index(elements, tuple(shape)), dim=-1)


def _aliases(model: nn.Module) -> dict[str, str]:
    """Names of the maps inside PyTorch's attention: the module's for its packed and its output weight."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            prefix = f"{name}." if name else ""
            found[f"{prefix}in_proj_weight"] = name
            found[f"{prefix}out_proj.weight"] = f"{prefix}out_proj"
    return found
