"""An accelerator that the processor plays: tensors say that they are elsewhere, and every wait for them is noted.

PyTorch itself thinks that they are on its device "meta", where operations are refused that mix them with tensors
of the processor. Their numbers are real, so that what is computed there can be compared.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
PACKAGE = "qkov_lightning"

aten = torch.ops.aten
ASKING = {
    aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten.bincount, aten.unique_consecutive,
    aten._unique2, aten.unique_dim, aten.is_nonzero,
}  # fmt: skip
"""Operations whose result, or its size, the processor waits for."""

INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class Away(Tensor):
    """A tensor of the simulated device. The processor cannot read it but through ``SimulatedDevice``."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Away:
        away: Away = Tensor._make_wrapper_subclass(
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device=DEVICE
        )
        away.here = here
        return away

    def data_ptr(self) -> int:
        return self.here.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"Away({self.here})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise RuntimeError(f"{func} outside of a SimulatedDevice")


class _Constants(TorchFunctionMode):
    """Makes constants on the processor and takes them away: on the device "meta" they would have no numbers."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in {torch.tensor, torch.as_tensor} and kwargs.get("device") == DEVICE:
            del kwargs["device"]
            return func(*args, **kwargs).to(DEVICE)
        return func(*args, **kwargs)


class SimulatedDevice(TorchDispatchMode):
    """While entered, the device "meta" is an accelerator with numbers.

    Args:
        has_float64: Whether it knows float64, as that of Apple does not.

    Attributes:
        waits: Where the processor waited for the device: the function of the package, and the operation. Calls
            from outside of the package are not noted.
    """

    def __init__(self, has_float64: bool = True) -> None:
        super().__init__()
        self.has_float64 = has_float64
        self.waits: list[tuple[str, str]] = []
        self._constants = _Constants()

    def __enter__(self) -> SimulatedDevice:
        self._constants.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._constants.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        away = [tensor for tensor in tensors if isinstance(tensor, Away)]
        device = kwargs.get("device")
        goes_away = bool(away) if device is None else torch.device(device) == DEVICE
        if func.overloadpacket is aten.copy_:
            goes_away = isinstance(args[0], Away)
        self._check(func, args, kwargs, tensors, away, goes_away)
        own = {**kwargs, "device": torch.device("cpu")} if device is not None else kwargs
        result = func(*tree_map(_here, args), **tree_map(_here, own))
        if not goes_away or not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            return result
        if not self.has_float64 and any(leaf.dtype == torch.float64 for leaf in tree_leaves(result)):
            raise TypeError(f"{func}: the device has no float64.")
        result = tree_map(lambda leaf: Away(leaf) if isinstance(leaf, Tensor) else leaf, result)
        return return_and_correct_aliasing(func, args, kwargs, result)

    def _check(
        self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], away: list[Tensor], goes_away: bool
    ) -> None:
        packet = func.overloadpacket
        if packet in {aten._to_copy, aten.copy_}:
            crosses = len({isinstance(tensor, Away) for tensor in tensors} | {goes_away}) > 1
            if crosses and not (kwargs.get("non_blocking") or (packet is aten.copy_ and True in args[2:])):
                self._note(func)
            return
        if not away:
            return
        if packet in INDEXING:
            indices = [index for index in args[1] if index is not None]
            if any(
                index.dtype in {torch.bool, torch.uint8} or not isinstance(index, Away) for index in indices
            ):
                self._note(func)
            tensors = [tensor for tensor in tensors if all(tensor is not index for index in indices)]
        if any(tensor.ndim and not isinstance(tensor, Away) for tensor in tensors):
            raise RuntimeError(f"{func}: expected all tensors on one device, at {_caller()}.")
        if packet in ASKING or func in {aten.repeat_interleave.Tensor, aten.repeat_interleave.self_Tensor}:
            self._note(func)

    def _note(self, func: Any) -> None:
        caller = _caller()
        if caller:
            self.waits.append((caller, func.overloadpacket.__name__))


def _here(value: Any) -> Any:
    return value.here if isinstance(value, Away) else value


def _caller() -> str:
    """The innermost function of the package that is running; nothing if there is none."""
    frame = sys._getframe()
    while frame := frame.f_back:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parts:
            return f"{path.stem}.{frame.f_code.co_name}"
    return ""


def away(value: Any) -> Any:
    """A copy of a tensor on the simulated device."""
    return value.to(DEVICE)


Simulated = Callable[[], SimulatedDevice]
