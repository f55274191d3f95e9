"""Per-sample gradient factors of the attention projections, from ordinary backward passes.

One class holds the taps and the account of what they must deliver: both are about the same calls of the same
modules.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qkov_lightning.capture.factors import CapturedStep, Delivery, GradientFactors, fits, inputs_of, join
from qkov_lightning.capture.reductions import LossReduction, sample_scales
from qkov_lightning.capture.samples import Labels, current_labels
from qkov_lightning.heads.multihead import MultiheadLinears
from qkov_lightning.heads.projections import Projection
from qkov_lightning.heads.weights import is_trainable


class CaptureWarning(UserWarning):
    """Gradients of a projection could not be captured; its cells lack the samples of that step."""


@dataclass(eq=False)
class _Call:
    """One forward call of one module, under the labels of a ``with task(...)`` or of the batch (None)."""

    module_name: str
    labels: Labels | None
    recomputed: bool
    deliveries: list[Delivery] = field(default_factory=list)


class _Tap(torch.autograd.Function):
    """Identity that sees the gradient of a module's output beside the module's input.

    ``save_for_backward`` rather than a closure: activation checkpointing can then drop the activation
    and bring it back, so that the tap holds no memory of its own.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, activation: Tensor, deliver: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(activation)
        ctx.deliver = deliver
        # A clone, not a view: the model may go on to change its output in place (`q *= scale`).
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (activation,) = ctx.saved_tensors
        ctx.deliver(activation, grad_outputs[0])
        return grad_outputs[0], None, None


def _inside_backward() -> bool:
    """Whether autograd is running: a forward then is the recomputation of a checkpoint."""
    return torch._C._current_graph_task_id() != -1


class GradientCapture:
    """Taps on the projections of a model.

    Between ``start`` and ``finish`` every forward and backward pass is watched; otherwise the taps let
    everything pass untouched. In a training loop of one's own::

        with GradientCapture(model, find_projections(model)) as capture:
            capture.start()
            with task(batch["task"]):
                loss = loss_function(model(batch["x"]), batch["y"])
            loss.backward()
            steps = capture.finish()

    Args:
        model: Holds the projections.
        projections: What to watch.
        loss_reduction: How the loss joins the samples of a batch.
        rank: This process, where several number their samples.
        world_size: Number of such processes.

    Attributes:
        scale: Multiplies every gradient that arrives after it is set; ``start`` sets it to 1. Undoes
            what the training loop did to the loss: accumulation, gradient scaling.
        numbering: Samples without an identifier seen so far, per task.
    """

    def __init__(
        self,
        model: nn.Module,
        projections: Sequence[Projection],
        loss_reduction: LossReduction = "mean",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._modules = {p.module_name: model.get_submodule(p.module_name) for p in projections}
        owners = {name.removesuffix("out_proj").removesuffix(".") for name in self._modules}
        candidates = {name: model.get_submodule(name) for name in sorted(owners)}
        self._packed = {n: m for n, m in candidates.items() if isinstance(m, nn.MultiheadAttention)}
        self._loss_reduction = loss_reduction
        self._rank, self._world_size = rank, world_size
        self.numbering: Counter[str] = Counter()
        self._warned: set[str] = set()
        self._handles: list[Any] = []
        self._eager = ExitStack()
        self._reset()

    def _reset(self) -> None:
        self._eager.close()
        self._active = False
        self._calls: list[_Call] = []
        self._ran_without_grad: set[str] = set()
        self._problems: dict[str, str] = {}
        self._leftovers: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.scale = 1.0

    def install(self) -> None:
        """Put the taps in place."""
        if not self._handles:
            for name, module in self._modules.items():
                if not isinstance(module, nn.MultiheadAttention):
                    self._handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))
            for name, attention in self._packed.items():
                self._handles += self._watch_packed(name, attention)

    def remove(self) -> None:
        """Take the taps away and forget what they saw."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._reset()

    def __enter__(self) -> GradientCapture:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def active(self) -> bool:
        """Whether a step is being captured."""
        return self._active

    def start(self) -> None:
        """Watch from now on. Compiled modules run eagerly until the step ends: compiled code calls no taps."""
        self._reset()
        self._active = True
        self._eager.enter_context(torch.compiler.set_stance("force_eager"))
        # Earlier steps leave gradients behind (accumulation, several optimisers); references would keep their
        # memory.
        for module in self._modules.values():
            for parameter in module.parameters():
                if parameter.grad is not None:
                    grad = parameter.grad
                    self._leftovers[id(parameter)] = (weakref.ref(grad), grad._version)

    def discard(self) -> None:
        """Forget the step."""
        self._reset()

    def finish(self, batch_labels: Callable[[], Labels] | None = None) -> list[CapturedStep]:
        """End the step and hand over what was captured.

        Args:
            batch_labels: Gives the labels of forward passes that ran outside ``with task(...)``.

        Returns:
            One captured step per labelled forward pass that reached the loss.

        Raises:
            ValueError: If samples have no task, or no projection's input has one row per sample.

        Warns:
            CaptureWarning: Once per projection whose gradients did not arrive.
        """
        try:
            self._account()
            steps = []
            for labels in dict.fromkeys(call.labels for call in self._calls if call.deliveries):
                calls = [call for call in self._calls if call.labels is labels and call.deliveries]
                if labels is None:
                    if batch_labels is None:
                        raise ValueError(
                            "The samples have no task: wrap the forward pass in `with task(...)`. (Reentrant "
                            "checkpoints run again outside of it: use `use_reentrant=False`.)"
                        )
                    labels = batch_labels()
                steps.append(self._collect(labels, calls))
            self._warn()
            return [step for step in steps if step.factors]
        finally:
            self._reset()

    def _hook(self, name: str) -> Callable[..., Tensor | None]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
        ) -> Tensor | None:
            if not self._active or not is_trainable(module):
                return None
            if not isinstance(output, Tensor):
                self._problems[name] = f"its output is a {type(output).__name__}, expected one tensor"
                return None
            return self._tapped(name, args[0] if args else next(iter(kwargs.values())), output)

        return hook

    def _tapped(
        self, name: str, activation: Tensor, output: Tensor, start: int = 0, width: int | None = None
    ) -> Tensor | None:
        """The output with a tap on it; it may be ``width`` features of a module from ``start`` on."""
        if not (torch.is_grad_enabled() and output.requires_grad):
            self._ran_without_grad.add(name)
            return None
        call = _Call(name, current_labels(), recomputed=_inside_backward())
        self._calls.append(call)
        after = 0 if width is None else width - start - output.shape[-1]

        def deliver(activation: Tensor, grad_output: Tensor) -> None:
            if not self._active:
                return
            if torch.is_grad_enabled():
                self._problems[name] = (
                    "its backward pass is differentiated again (create_graph=True), which adds gradients "
                    "that do not pass through its output"
                )
            grad = nn.functional.pad(grad_output.detach(), (start, after))
            call.deliveries.append(Delivery(activation.detach(), grad, self.scale))

        tapped: Tensor = _Tap.apply(output, activation.detach(), deliver)
        return tapped

    def _watch_packed(self, name: str, attention: nn.MultiheadAttention) -> list[Any]:
        """Hooks that show the inside of an attention that calls no submodule, while it runs."""

        def on_linear(linear: str, start: int, activation: Tensor, output: Tensor) -> Tensor:
            module = self._modules.get(linear)
            if module is None or not is_trainable(module):
                return output
            width = len(attention.in_proj_weight) if module is attention else None
            tapped = self._tapped(linear, activation, output, start, width)
            return output if tapped is None else tapped

        linears = MultiheadLinears({name: attention}, on_linear)
        entered: list[MultiheadLinears] = []

        def enter(*_: object) -> None:
            if self._active:
                entered.append(linears.__enter__())

        def leave(*_: object) -> None:
            if entered:
                entered.pop().__exit__(None, None, None)

        return [
            attention.register_forward_pre_hook(enter),
            attention.register_forward_hook(leave, always_call=True),
        ]

    def _account(self) -> None:
        """Find every trainable projection that ran but did not deliver."""
        delivered = {call.module_name for call in self._calls if call.deliveries}
        ran = {call.module_name for call in self._calls if not call.recomputed} | self._ran_without_grad
        for name, module in self._modules.items():
            if name in delivered:
                continue
            if name in ran:
                self._problems[name] = "it ran forward, but no gradient of its output arrived"
            elif is_trainable(module) and any(self._got_gradient(p) for p in module.parameters()):
                self._problems[name] = (
                    "it has a gradient, but its forward pass was not seen (compiled before the monitor "
                    "started, or its weight used without calling it)"
                )

    def _got_gradient(self, parameter: nn.Parameter) -> bool:
        """Whether the step added to the gradient of a parameter."""
        grad = parameter.grad
        if grad is None:
            return False
        known, version = self._leftovers.get(id(parameter), (lambda: None, -1))
        if known() is grad and grad._version == version:
            return False
        # Under FSDP2 the whole is shared out, and asking for it would wait for the other processes.
        return bool(getattr(grad, "to_local", lambda: grad)().any())

    def _collect(self, labels: Labels, calls: list[_Call]) -> CapturedStep:
        deliveries = [delivery for call in calls for delivery in call.deliveries]
        num_samples = labels.num_samples or deliveries[0].activation.shape[0]
        rows = {delivery.activation.shape[0] for delivery in deliveries}
        if labels.token_samples is None and len(rows) == 1 and num_samples not in rows:
            raise ValueError(
                f"{num_samples} tasks (or sample ids) were given, but the inputs of the projections have "
                f"{rows.pop()} rows: expected one task per sample, and samples along the first dimension. For packed "
                "sequences or flattened tokens, say which sample each token belongs to (`token_samples`)."
            )
        samples = labels.resolve(num_samples, self.numbering, self._rank, self._world_size)
        by_module: dict[str, list[Delivery]] = {}
        for call in calls:
            by_module.setdefault(call.module_name, []).extend(call.deliveries)
        sharing: dict[tuple[object, ...], dict[str, list[Delivery]]] = {}
        for name, own in by_module.items():
            shape = next((tuple(d.activation.shape) for d in own if not fits(d, num_samples, labels)), None)
            if shape is not None:
                self._problems[name] = f"its input has shape {shape}, expected " + (
                    f"the first dimension to be the {num_samples} samples of the batch"
                    if labels.token_samples is None
                    else f"one token for each of the {labels.token_samples.numel()} entries of `token_samples`"
                )
            if name not in self._problems:
                sharing.setdefault(inputs_of(own), {})[name] = own
        scale = deliveries[0].scale
        # What was delivered is let go as soon as it is copied: both together would be twice the memory.
        del deliveries, by_module
        for call in calls:
            call.deliveries.clear()
        factors: dict[str, GradientFactors] = {}
        while sharing:
            modules = sharing.pop(next(iter(sharing)))
            factors |= join(modules, num_samples, labels.token_samples, scale)
        if not factors:
            raise ValueError(
                "No projection could be captured: "
                + "; ".join(f"`{name}`: {problem}" for name, problem in self._problems.items())
                + f". The labels say that the batch has {num_samples} samples."
            )
        return CapturedStep(samples, sample_scales(samples, self._loss_reduction) * scale, factors)

    def _warn(self) -> None:
        for name, problem in self._problems.items():
            if name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"Projection `{name}`: {problem}. Its cells have no data from such steps.",
                    CaptureWarning,
                    stacklevel=3,
                )
