"""The loss of a model on a batch outside of training, without leaving a trace.

Nothing of a run is touched: not its random numbers, buffers, modes or logged values. Gradients and parameters
are the caller's to leave alone.
"""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Loss = Callable[[nn.Module, Any], Tensor]


def training_loss(model: nn.Module) -> Loss:
    """The loss that ``training_step`` returns.

    Raises:
        ValueError: If there is none to call.
    """
    if not isinstance(model, LightningModule) or not model.automatic_optimization:
        raise ValueError(
            f"{type(model).__name__} has no `training_step` that returns a loss (a LightningModule with automatic "
            "optimisation has one): pass `loss=<function of the model and a batch>`."
        )
    takes_index = len(inspect.signature(model.training_step).parameters) > 1

    def loss(model: Any, batch: Any) -> Tensor:
        outputs = model.training_step(batch, 0) if takes_index else model.training_step(batch)
        value: Tensor = outputs["loss"] if isinstance(outputs, dict) else outputs
        return value

    return loss


def forward_pass(model: LightningModule, batch: Any) -> object:
    """The loss of a training step; None of a module that optimises by itself.

    Such a module meets optimisers that do nothing, and its step ends at its first backward pass.
    """
    if model.automatic_optimization:
        return training_loss(model)(model, batch)
    takes_index = len(inspect.signature(model.training_step).parameters) > 1
    stand_ins = {"manual_backward": _stop, "optimizers": _NoOptimizer, "lr_schedulers": _NoOptimizer}
    vars(model).update(stand_ins)
    try:
        with _NoBackward(), contextlib.suppress(_ForwardOverError):
            model.training_step(*([batch, 0] if takes_index else [batch]))
    finally:
        for name in stand_ins:
            vars(model).pop(name, None)
    return None


class _ForwardOverError(Exception):
    """The forward pass is over."""


def _stop(*_: object, **__: object) -> None:
    raise _ForwardOverError


class _NoOptimizer:
    """An optimiser, or several of them, that does nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        self.param_groups: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return _NoOptimizer

    def __call__(self, *_: object, **__: object) -> _NoOptimizer:
        return self

    def __iter__(self) -> Iterator[_NoOptimizer]:
        return iter([_NoOptimizer()] * 2)

    def __getitem__(self, _: int) -> _NoOptimizer:
        return self

    def __enter__(self) -> _NoOptimizer:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _NoBackward(TorchFunctionMode):
    """A backward pass ends the forward pass before it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.backward:
            raise _ForwardOverError
        return func(*args, **(kwargs or {}))


def to_device(model: nn.Module, batch: Any, device: torch.device) -> Any:
    """A batch on a device, by the hooks of a LightningModule where the model is one."""
    if not isinstance(model, LightningModule):
        return move_data_to_device(batch, device)
    if model._trainer is not None:
        return model.trainer.strategy.batch_to_device(batch, device)
    return model.on_after_batch_transfer(model.transfer_batch_to_device(batch, device, 0), 0)


@contextlib.contextmanager
def rehearsing(model: nn.Module, *, evaluation: bool) -> Iterator[None]:
    """Run the model here: eagerly, with random numbers of its own, and with everything as before in the end.

    Args:
        model: Restored, attribute by attribute.
        evaluation: Whether it runs in evaluation mode, or in the modes that its modules are in.
    """
    with torch.inference_mode(False), _untouched(model), _fixed_randomness(), _eager():
        if evaluation:
            model.eval()
        yield


def reseed(number: int) -> None:
    """Begin a stream of random numbers that depends on the number alone; inside ``rehearsing``."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Nothing logged, and every attribute and buffer as before in the end."""
    saved = [_Saved(module) for module in model.modules()]
    try:
        if isinstance(model, LightningModule):
            vars(model)["log"] = _ignore
        yield
    finally:
        for one in saved:
            one.restore()


def _ignore(*_: object, **__: object) -> None:
    """Stand in for ``LightningModule.log``: the probe's loss is no training loss."""


class _Saved:
    """Attributes of one module: which objects they are, and the contents of tensors and containers.

    Metrics keep their states in such attributes, outside of the buffers.
    """

    def __init__(self, module: nn.Module) -> None:
        self._attributes = vars(module)
        self._values = dict(self._attributes)
        values = [*self._values.values(), *module._buffers.values()]
        self._tensors = [
            (value, value.detach().clone())
            for value in values
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
        ]
        self._lists = [(value, list(value)) for value in values if type(value) is list]
        self._dicts = [(value, value.copy()) for value in values if isinstance(value, dict)]

    def restore(self) -> None:
        self._attributes.clear()
        self._attributes.update(self._values)
        for values, before in self._lists:
            values[:] = before
        for mapping, content in self._dicts:
            mapping.clear()
            mapping.update(content)
        with torch.no_grad():
            for tensor, value in self._tensors:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


@contextlib.contextmanager
def _fixed_randomness() -> Iterator[None]:
    """The same random numbers each time, and the run's own ones untouched."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            reseed(0)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Compiled code would pass by the taps."""
    if hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()
