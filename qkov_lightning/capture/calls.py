"""One call of one projection: the tap on its output, and what the backward passes deliver to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qkov_lightning.capture.factors import Delivery
from qkov_lightning.capture.samples import Labels


@dataclass(eq=False)
class Call:
    """A forward call of a module, under the labels of a ``with task(...)`` or of the batch (None).

    Attributes:
        module_name: The module.
        labels: Those of its samples.
        recomputed: Whether a checkpoint called it again, inside the backward pass.
        deliveries: What backward passes gave to it.
    """

    module_name: str
    labels: Labels | None
    recomputed: bool
    deliveries: list[Delivery] = field(default_factory=list)


class Tap(torch.autograd.Function):
    """Identity that sees the gradient of a module's output beside the module's input.

    ``save_for_backward`` rather than a closure: activation checkpointing can then drop the activation
    and bring it back, so that the tap holds no memory of its own.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, activation: Tensor, call: Call, deliver: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        """Keep the input and let the output pass."""
        ctx.save_for_backward(activation)
        ctx.tap, ctx.deliver = call, deliver
        # A clone, not a view: the model may go on to change its output in place (`q *= scale`).
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        """Deliver the gradient and let it pass."""
        (activation,) = ctx.saved_tensors
        ctx.deliver(activation, grad_outputs[0])
        return grad_outputs[0], None, None, None


class EagerModules:
    """Compiled modules run eagerly while at least one of these is entered.

    The stance of torch is the process's own.
    """

    _entered: ClassVar[int] = 0
    _stance: ClassVar[ExitStack] = ExitStack()

    def __init__(self) -> None:
        self._is_entered = False

    def enter(self) -> None:
        """Run them eagerly from now on."""
        if not self._is_entered:
            if not EagerModules._entered:
                EagerModules._stance.enter_context(torch.compiler.set_stance("force_eager"))
            self._is_entered = True
            EagerModules._entered += 1

    def leave(self) -> None:
        """Run them as before, unless another one is entered."""
        if self._is_entered:
            self._is_entered = False
            EagerModules._entered -= 1
            if not EagerModules._entered:
                EagerModules._stance.close()


def inside_backward() -> bool:
    """Whether autograd is running: a forward then is the recomputation of a checkpoint."""
    return torch._C._current_graph_task_id() != -1


def accumulator(parameters: Sequence[nn.Parameter]) -> Any:
    """The autograd node that adds to the ``.grad`` of the first of them that trains, if one does."""
    for parameter in parameters:
        if parameter.requires_grad:
            return torch.autograd.graph.get_gradient_edge(parameter).node
    return None


def adds_up(node: Any) -> bool:
    """Whether the running backward pass adds to ``.grad``; ``autograd.grad`` returns gradients instead."""
    try:
        return node is not None and bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # `autograd.grad` of this very parameter
        return False


def is_batched(gradient: Tensor) -> bool:
    """Whether it stands for several gradients at once (``autograd.grad(..., is_grads_batched=True)``)."""
    functorch = torch._C._functorch
    return bool(functorch.is_batchedtensor(gradient) or functorch.is_legacy_batchedtensor(gradient))
