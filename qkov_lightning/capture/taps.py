"""Per-sample gradient factors of the attention projections, from ordinary backward passes.

One class holds the taps and the account of what they must deliver: both are about the same calls of the same
modules.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qkov_lightning.capture.batches import target_counts
from qkov_lightning.capture.calls import (
    Call,
    EagerModules,
    Tap,
    accumulator,
    adds_up,
    inside_backward,
    is_batched,
)
from qkov_lightning.capture.factors import CapturedStep, Delivery, GradientFactors, fits, inputs_of, join
from qkov_lightning.capture.joinings import Joining
from qkov_lightning.capture.loss_terms import LossTerm, read_loss
from qkov_lightning.capture.reductions import ReductionChoice, check_rows, joining
from qkov_lightning.capture.samples import Labels, current_labels
from qkov_lightning.heads.multihead import MultiheadLinears
from qkov_lightning.heads.projections import Projection
from qkov_lightning.heads.weights import is_trainable


class CaptureWarning(UserWarning):
    """Gradients of a projection could not be captured; its cells lack the samples of that step."""


class _Hook:
    """A hook that copies of the module do not inherit: a deep copy or a pickle holds one that is empty."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, *args: Any) -> Any:
        return self._hook(*args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*_: object) -> None:
    pass


class GradientCapture:
    """Taps on the projections of a model.

    Between ``start`` and ``finish`` every forward and backward pass is watched; otherwise the taps let
    everything pass untouched. In a training loop of one's own::

        with GradientCapture(model, find_projections(model)) as capture:
            capture.start()
            with task(batch["task"]):
                loss = loss_function(model(batch["x"]), batch["y"])
            capture.note_loss(loss)
            loss.backward()
            steps = capture.finish()

    A step counts every sample once. Where an optimiser evaluates the same batch again after it has moved the
    weights (L-BFGS, SAM), the first evaluation counts. Where gradients are asked for
    (``torch.autograd.grad``) beside a backward pass that adds them up, the backward pass counts.

    Args:
        model: Holds the projections.
        projections: What to watch.
        loss_reduction: How the loss joins the samples of a batch; "auto" reads it from the loss that
            ``note_loss`` is given.
        rank: This process, where several number their samples.
        world_size: Number of such processes.

    Attributes:
        scale: Multiplies every gradient that arrives after it is set; ``start`` sets it to 1. Undoes
            what the training loop did to the loss: accumulation, gradient scaling.
        numbering: Samples without an identifier seen so far, per task.
        joined: How the loss joined the samples of the last captured step; None before the first.
    """

    def __init__(
        self,
        model: nn.Module,
        projections: Sequence[Projection],
        loss_reduction: ReductionChoice = "auto",
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
        self.joined: Joining | None = None
        self._warned: set[str] = set()
        self._handles: list[Any] = []
        self._eager = EagerModules()
        self._reset()

    def _reset(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._eager.leave()
        self._active = self._paused = False
        self._calls: list[Call] = []
        self._versions: dict[tuple[str, object], tuple[int, ...]] = {}
        self._terms: list[LossTerm] = []
        self._edges: list[torch.autograd.graph.GradientEdge] = []
        self._ran_without_grad: set[str] = set()
        self._batched: set[str] = set()
        self._problems: dict[str, str] = {}
        self._leftovers: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.scale = 1.0

    def __enter__(self) -> GradientCapture:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    @property
    def active(self) -> bool:
        """Whether a step is being captured."""
        return self._active

    def start(self) -> None:
        """Watch from now on. Compiled modules run eagerly until the step ends: compiled code calls no taps.

        The taps are there in captured steps only: in between, the model is as it was found.
        """
        self._reset()
        self._active = True
        for name, module in self._modules.items():
            if not isinstance(module, nn.MultiheadAttention):
                hook = _Hook(self._hook(name, module))
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        for name, attention in self._packed.items():
            self._handles += self._watch_packed(name, attention)
        self._eager.enter()
        # Earlier steps leave gradients behind (accumulation, several optimisers); references would keep their
        # memory.
        for module in self._modules.values():
            for parameter in module.parameters():
                if parameter.grad is not None:
                    grad = parameter.grad
                    self._leftovers[id(parameter)] = (weakref.ref(grad), grad._version)

    def note_loss(self, loss: Tensor) -> None:
        """Read how the loss joins its samples, before its backward pass."""
        if self._active and not self._paused:
            self._terms += read_loss(loss)

    @property
    def edges(self) -> list[torch.autograd.graph.GradientEdge]:
        """What to ask ``torch.autograd.grad`` for where nothing but the step itself is wanted.

        The outputs of the watched modules: their gradients pass the taps, the backward pass ends at the
        lowest of them, and no weight gets a gradient.
        """
        return list(self._edges)

    def pause(self) -> None:
        """Watch no further forward pass of this step."""
        self._paused = True

    def discard(self) -> None:
        """Forget the step, and take the taps away."""
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
            self._drop_asked_for()
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
                steps.append(self._collect(labels, calls, self._terms_of(calls)))
            self._warn()
            return [step for step in steps if step.factors]
        finally:
            self._reset()

    def _hook(self, name: str, owner: nn.Module) -> Callable[..., Tensor | None]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
        ) -> Tensor | None:
            # A shallow copy shares the hooks of its original.
            if module is not owner or self._paused or not is_trainable(module):
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
        call = Call(name, current_labels(), recomputed=inside_backward())
        if not call.recomputed and self._evaluates_again(call):
            return None
        self._calls.append(call)
        if not call.recomputed:
            self._edges.append(torch.autograd.graph.get_gradient_edge(output))
        after = 0 if width is None else width - start - output.shape[-1]
        adding = accumulator(self._modules[name])

        def deliver(activation: Tensor, grad_output: Tensor) -> None:
            if not self._active:
                return
            if is_batched(grad_output):
                self._batched.add(name)
                return
            if torch.is_grad_enabled():
                self._problems[name] = (
                    "its backward pass is differentiated again (create_graph=True), which adds gradients "
                    "that do not pass through its output"
                )
            grad = nn.functional.pad(grad_output.detach(), (start, after))
            call.deliveries.append(Delivery(activation.detach(), grad, self.scale, adds_up(adding)))

        tapped: Tensor = Tap.apply(output, activation.detach(), call, deliver)
        return tapped

    def _evaluates_again(self, call: Call) -> bool:
        """Whether the samples of a call have passed its module in this step, before its weights moved."""
        versions = tuple(parameter._version for parameter in self._modules[call.module_name].parameters())
        known = None if call.labels is None else call.labels.key
        return self._versions.setdefault((call.module_name, known), versions) != versions

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

        def enter(module: nn.Module, *_: object) -> None:
            if module is attention and not self._paused:
                entered.append(linears.__enter__())

        def leave(*_: object) -> None:
            if entered:
                entered.pop().__exit__(None, None, None)

        return [
            attention.register_forward_pre_hook(_Hook(enter)),
            attention.register_forward_hook(_Hook(leave), always_call=True),
        ]

    def _drop_asked_for(self) -> None:
        """Leave out what ``autograd.grad`` returned, where a backward pass added gradients up as well."""
        if any(delivery.adds_up for call in self._calls for delivery in call.deliveries):
            for call in self._calls:
                call.deliveries[:] = [delivery for delivery in call.deliveries if delivery.adds_up]

    def _account(self) -> None:
        """Find every trainable projection that ran but did not deliver."""
        delivered = {call.module_name for call in self._calls if call.deliveries}
        ran = {call.module_name for call in self._calls if not call.recomputed} | self._ran_without_grad
        for name, module in self._modules.items():
            if name in delivered:
                continue
            if name in self._batched:
                self._problems[name] = "its gradients were asked for several at once (is_grads_batched=True)"
            elif name in ran:
                self._problems[name] = "it ran forward, but no gradient of its output arrived"
            elif is_trainable(module) and any(self._got_gradient(p) for p in module.parameters()):
                self._problems[name] = (
                    "it has a gradient, but its forward pass was not seen (compiled before the monitor "
                    "started, or its weight used without calling it)"
                )

    def _terms_of(self, calls: list[Call]) -> list[LossTerm]:
        """Parts of the loss that these calls led to; without any, those whose calls are not seen."""
        own = [term for term in self._terms if term.owner in calls]
        return own or [term for term in self._terms if term.owner is None]

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

    def _collect(self, labels: Labels, calls: list[Call], terms: list[LossTerm]) -> CapturedStep:
        deliveries = [delivery for call in calls for delivery in call.deliveries]
        rows = {delivery.activation.shape[0] for delivery in deliveries}
        num_samples = labels.num_samples or deliveries[0].activation.shape[0]
        if labels.token_samples is None and len(rows) == 1:
            check_rows(rows.pop(), labels, terms)
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
        self.joined = joining(
            samples, self._loss_reduction, terms, labels.token_samples, partial(target_counts, labels.batch)
        )
        scales, num_terms = self.joined.scales(num_samples) * scale, self.joined.terms(num_samples)
        return CapturedStep(samples, scales, num_terms, factors)

    def _warn(self) -> None:
        for name, problem in self._problems.items():
            if name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"Projection `{name}`: {problem}. Its cells have no data from such steps.",
                    CaptureWarning,
                    stacklevel=3,
                )
