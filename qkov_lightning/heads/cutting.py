"""The graph of a forward pass, cut at the output of every linear map and at every softmax."""

from __future__ import annotations

import contextlib
import math
import weakref
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qkov_lightning.heads.leaves import NAMELESS, Leaf
from qkov_lightning.heads.maps import is_map
from qkov_lightning.heads.parameter_views import flat
from qkov_lightning.heads.softmaxes import Softmax, SoftmaxWatcher, derivatives_on, leaves_of, trace
from qkov_lightning.heads.watching import Product, on_call


class Uses(Protocol):
    """An attention that wants to know what uses its result."""

    def note_use(self, name: str, reached: Collection[int]) -> None:
        """A linear map of this name used it, or the model gave it back."""


class GraphCutter(SoftmaxWatcher):
    """Cuts the graph at every map and softmax, and closes an attention as soon as its output is used."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, self._products)
        self._model = model
        self.softmaxes: list[Softmax] = []
        self._leaf_of: dict[int, Leaf] = {}
        self._closed: dict[int, tuple[weakref.ref[Tensor], Uses | None]] = {}
        self._widths: dict[str, int] = {}
        self._axes: dict[str, tuple[int, ...]] = {}
        self._clashes: set[str] = set()
        self._partial: list[Product] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on the linear modules, and sight of the products without one."""
        handles: list[Any] = []
        for name, module in self._model.named_modules():
            if is_map(module) and not isinstance(module, nn.MultiheadAttention):
                hook = on_call(name, module, self._products)
                handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
                handles.append(module.register_forward_hook(self._leave(hook), with_kwargs=True))
            elif isinstance(module, nn.RNNBase):
                handles.append(
                    module.register_forward_hook(lambda _module, _args, output: self._cut_all(output))
                )
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, *_: object) -> None:
        self._inside += 1

    def _leave(self, hook: Callable[..., Tensor | None]) -> Callable[..., Any]:
        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            self._inside -= 1
            if self._inside:
                return None
            if not isinstance(output, Tensor):
                return self._cut_all(output)
            with torch._C.DisableTorchFunction(), derivatives_on():
                return hook(module, args, kwargs, output)

        return leave

    def _cut_all(self, output: Any) -> Any:
        """The tensors that a module gives which is no plain linear map: features, but nobody's."""
        if not isinstance(output, tuple | list):
            return None
        return type(output)(self._mixed(one, [one]) if isinstance(one, Tensor) else one for one in output)

    # What is seen

    def _products(self, products: Sequence[Product]) -> list[Tensor | None]:
        with torch._C.DisableTorchFunction():
            self._used(products)
            return [self._cut(product) for product in products]

    def _cut(self, product: Product) -> Tensor:
        leaf = product.output.detach().clone().requires_grad_()
        nameless = f"{NAMELESS} {len(self._leaf_of)}"
        features = [(nameless, column) for column in range(leaf.shape[-1])]
        for piece in product.pieces:
            self._note_axes(piece.name, piece.axes_of_inputs)
            own = piece.output_features(self._axes[piece.name]).tolist()
            self._widths[piece.name] = _width(piece.shape, self._axes[piece.name])
            for column, feature in zip(piece.columns.tolist(), own, strict=True):
                features[column] = (piece.name, feature)
        activation = product.activation
        source = (activation.data_ptr(), *activation.shape, *activation.stride())
        upstream, is_joined = self._before(activation)
        before = [self._leaf_of[key] for key in upstream if key in self._leaf_of]
        origins = frozenset(one.source for one in before).union(*(one.origins for one in before))
        self._leaf_of[id(leaf)] = Leaf(leaf, tuple(features), source, upstream, is_joined, origins)
        return leaf.clone()

    def _before(self, activation: Tensor) -> tuple[frozenset[int], bool]:
        """The leaves before an input, and whether queries and keys have met on the way."""
        seen = trace(activation)
        has_softmax = any(key not in self._leaf_of for key in seen.leaves)
        return frozenset(seen.leaves), seen.is_joined and not has_softmax

    def _mixed(self, output: Any, args: Any) -> Any:
        """The result of an unknown function of a weight has features, but they are nobody's."""
        if not isinstance(output, Tensor) or not output.requires_grad or output.ndim < 2:
            return output
        inputs = [one for one in flat(args) if isinstance(one, Tensor) and one.requires_grad]
        with torch._C.DisableTorchFunction():
            products = [Product(one, output, ()) for one in inputs]
            self._used(products)
            return self._cut(products[0])

    def _note_axes(self, name: str, axes: tuple[int, ...]) -> None:
        if self._axes.setdefault(name, axes) != axes:
            self._clashes.add(name)

    def _used(self, products: Sequence[Product]) -> None:
        """See whether the input of a linear map is the result of a softmax."""
        name = products[0].pieces[0].name if products[0].pieces else ""
        if self._partial and name == self._partial[0].pieces[0].name and _overlap(self._partial, products):
            self._flush()
        reached: set[int] = set()
        for product in products:
            reached |= set(leaves_of(product.activation))
        for key in reached & self._closed.keys():
            reference, found = self._closed[key]
            if reference() is not None and found is not None:
                found.note_use(name, reached)
        if not any(id(softmax.probabilities) in reached for softmax in self.softmaxes):
            return
        if self._partial and name != self._partial[0].pieces[0].name:
            self._flush()
        self._partial += products
        if not _is_partial(self._partial):
            self._flush()

    def _flush(self) -> None:
        """Look at the softmaxes whose result went into the last products."""
        products, self._partial = self._partial, []
        reached: set[int] = set()
        for product in products:
            reached |= set(leaves_of(product.activation))
        own = [softmax for softmax in self.softmaxes if id(softmax.probabilities) in reached]
        self.softmaxes = [softmax for softmax in self.softmaxes if id(softmax.probabilities) not in reached]
        self._close(own, products)

    def finish(self, output: object) -> None:
        """Look at what no linear map has used, and at what the model gives back."""
        with torch._C.DisableTorchFunction(), derivatives_on():
            if self._partial:
                self._flush()
            for softmax in self.softmaxes:
                self._close([softmax], [])
            for tensor in flat(_values(output)):
                if isinstance(tensor, Tensor):
                    reached = leaves_of(tensor)
                    for key in reached.keys() & self._closed.keys():
                        reference, found = self._closed[key]
                        if reference() is reached[key] and found is not None:
                            found.note_use("", reached)
        self.softmaxes = []

    @abstractmethod
    def _close(self, softmaxes: Sequence[Softmax], products: Sequence[Product]) -> None:
        """Look at softmaxes whose result goes into some products, or into none."""


def _values(output: object) -> list[Any]:
    """What a model gives back, as a list."""
    if isinstance(output, Mapping):
        return list(output.values())
    return list(output) if isinstance(output, tuple | list) else [output]


def _overlap(known: Sequence[Product], products: Sequence[Product]) -> bool:
    """Whether some input features of a parameter are used again."""
    before, now = (
        {tuple(index) for product in some for piece in product.pieces for index in piece.inputs.tolist()}
        for some in (known, products)
    )
    return bool(before & now)


def _is_partial(products: Sequence[Product]) -> bool:
    """Whether they use some of the input features of one parameter: others may follow, head by head."""
    pieces = [piece for product in products for piece in product.pieces]
    if len({piece.name for piece in pieces}) != 1:
        return False
    axes = [i for i in range(len(pieces[0].shape)) if i not in pieces[0].axes_of_outputs]
    used = {feature for piece in pieces for feature in piece.input_features(axes).tolist()}
    return len(used) < size_of(pieces[0].shape, axes)


def size_of(shape: Sequence[int], axes: Sequence[int]) -> int:
    """Product of the sizes of some axes."""
    return math.prod(shape[axis] for axis in axes)


def _width(shape: Sequence[int], input_axes: Sequence[int]) -> int:
    return size_of(shape, [axis for axis in range(len(shape)) if axis not in input_axes])
