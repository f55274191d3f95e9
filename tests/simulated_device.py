"""An accelerator that the processor plays: tensors that are elsewhere, and a note of every wait for them.

PyTorch thinks that they are on its device "meta". Operations that mix them with tensors of the processor are
refused. Their numbers are real, so that what is computed there can be compared.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls: type[Away], here: Tensor) -> Away:
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


def _constant(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes constants on the processor and takes them away: made on "meta" they would have no numbers."""

    def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        there = device is not None and torch.device(device) == DEVICE
        return make(*args, **kwargs).to(DEVICE) if there else make(*args, device=device, **kwargs)

    return made


class SimulatedDevice(TorchDispatchMode):
    """While entered, the device "meta" is an accelerator with numbers.

    Args:
        has_float64: Whether it knows float64, as that of Apple does not.

    Attributes:
        waits: Where the processor waited for the device: the function of the package, and the operation.
            Calls from outside of the package are not noted.
    """

    def __init__(self, has_float64: bool = True) -> None:
        super().__init__()
        self.has_float64 = has_float64
        self.waits: list[tuple[str, str]] = []
        self._patched = pytest.MonkeyPatch()

    def expect(self, allowed: Mapping[str, object], counts: Mapping[str, int] = {}) -> None:
        """Check where the processor waited.

        Args:
            allowed: Functions of the package that may wait.
            counts: How often some of them wait at most.
        """
        found = Counter(caller for caller, _ in self.waits)
        unexpected = {caller: number for caller, number in found.items() if caller not in allowed}
        assert not unexpected, f"The processor waited for the device in {unexpected}."
        for caller, most in counts.items():
            assert found[caller] <= most, f"{caller} waited {found[caller]} times, expected {most} at most."

    def __enter__(self) -> SimulatedDevice:
        self._patched.setattr(torch, "tensor", _constant(torch.tensor))
        self._patched.setattr(torch, "as_tensor", _constant(torch.as_tensor))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patched.undo()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors: list[Tensor] = []
        here = [_mapped(args, _noting(tensors)), {k: _mapped(v, _noting(tensors)) for k, v in kwargs.items()}]
        away = [tensor for tensor in tensors if isinstance(tensor, Away)]
        device = kwargs.get("device")
        goes_away = bool(away) if device is None else torch.device(device) == DEVICE
        if func.overloadpacket is aten.copy_:
            goes_away = isinstance(args[0], Away)
        self._check(func, args, kwargs, tensors, away, goes_away)
        if device is not None:
            here[1]["device"] = torch.device("cpu")
        result = func(*here[0], **here[1])
        if not goes_away:
            return result
        # What was changed in place stays the same object.
        known = {id(tensor.here): tensor for tensor in away}
        return _mapped(
            result, lambda tensor: known[id(tensor)] if id(tensor) in known else self._taken(func, tensor)
        )

    def _taken(self, func: Any, tensor: Tensor) -> Away:
        if tensor.dtype == torch.float64 and not self.has_float64:
            raise TypeError(f"{func}: the device has no float64.")
        return Away(tensor)

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


def _mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """A value with the tensors in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_mapped(one, change) for one in value) if type(value) in {list, tuple} else value


def _noting(tensors: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """Gives the numbers of a tensor, and notes the tensor."""

    def here(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor.here if isinstance(tensor, Away) else tensor

    return here


def _caller() -> str:
    """The innermost function of the package that is running; nothing if there is none."""
    frame = sys._getframe()
    while frame := frame.f_back:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parts:
            return f"{path.stem}.{frame.f_code.co_name}"
    return ""
