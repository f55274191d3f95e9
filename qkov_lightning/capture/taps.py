"""Per-sample gradient factors of the attention projections, from ordinary backward passes.

One class holds the taps and the account of what they must deliver: both are about the same calls of the same
modules.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from qkov_lightning.capture.factors import (
    CapturedStep,
    Delivery,
    GradientFactors,
    Scale,
    fits,
    inputs_of,
    join,
    token_orders,
)
from qkov_lightning.capture.joinings import Joining
from qkov_lightning.capture.loss_terms import LossTerm, TracedTerm, read_terms, trace_loss
from qkov_lightning.capture.placing import side_by_side
from qkov_lightning.capture.reductions import ReductionChoice, check_rows, joining
from qkov_lightning.capture.samples import Labels, current_labels
from qkov_lightning.heads.maps import LinearMap, MapPart, find_map, widened
from qkov_lightning.heads.projections import Projection
from qkov_lightning.heads.watching import MapWatcher, Piece, Product, on_call


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
        self._model = model
        self._maps: dict[str, LinearMap] = {p.module_name: find_map(model, p) for p in projections}
        self._outgoing = {name for p in projections if p.block == "O" for name in p.map_names}
        self._parts: dict[str, MapPart] = {
            part.name: part for one in self._maps.values() for part in one.parts
        }
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
        self._terms: list[TracedTerm] = []
        self._edges: list[torch.autograd.graph.GradientEdge] = []
        self._ran_without_grad: set[str] = set()
        self._batched: set[str] = set()
        self._problems: dict[str, str] = {}
        self._leftovers: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._scale = Scale(1.0)

    def __enter__(self) -> GradientCapture:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    @property
    def active(self) -> bool:
        """Whether a step is being captured."""
        return self._active

    @property
    def scale(self) -> float:
        """Multiplies every gradient that arrives after it is set; ``start`` sets it to 1.

        Undoes what the training loop did to the loss: accumulation, gradient scaling. A function is called
        when the step ends, so that the processor need not wait for a device that knows the number.
        """
        return float(self._scale)

    @scale.setter
    def scale(self, value: float | Callable[[], float]) -> None:
        self._scale = Scale(value)

    def start(self) -> None:
        """Watch from now on. Compiled modules run eagerly until the step ends: compiled code calls no taps.

        The taps are there in captured steps only: in between, the model is as it was found.
        """
        self._reset()
        self._active = True
        containers: dict[str, list[str]] = {}
        for name, part in self._parts.items():
            if part.container is not None:
                containers.setdefault(part.container, []).append(name)
            elif part.module is not None:
                hook = _Hook(self._hook(part, part.module))
                self._handles.append(part.module.register_forward_hook(hook, with_kwargs=True))
        for container, names in containers.items():
            self._handles += self._watch_inside(container, names)
        self._eager.enter()
        # Earlier steps leave gradients behind (accumulation, several optimisers); references would keep their
        # memory.
        for part in self._parts.values():
            for parameter in part.parameters:
                if parameter.grad is not None:
                    grad = parameter.grad
                    self._leftovers[id(parameter)] = (weakref.ref(grad), grad._version)

    def note_loss(self, loss: Tensor) -> None:
        """Read how the loss joins its samples, before its backward pass."""
        if self._active and not self._paused:
            self._terms += trace_loss(loss)

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
            steps, terms = [], read_terms(self._terms)
            for labels in dict.fromkeys(call.labels for call in self._calls if call.deliveries):
                calls = [call for call in self._calls if call.labels is labels and call.deliveries]
                if labels is None:
                    if batch_labels is None:
                        raise ValueError(
                            "The samples have no task: wrap the forward pass in `with task(...)`. (Reentrant "
                            "checkpoints run again outside of it: use `use_reentrant=False`.)"
                        )
                    labels = batch_labels()
                steps.append(self._collect(labels, calls, _terms_of(terms, calls)))
            self._warn()
            return [step for step in steps if step.factors]
        finally:
            self._reset()

    def _hook(self, part: MapPart, owner: nn.Module) -> Callable[..., Tensor | None]:
        show = on_call(part.name, owner, self._products)

        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
        ) -> Tensor | None:
            # A shallow copy shares the hooks of its original.
            if module is not owner or self._paused or not part.is_trainable:
                return None
            if not isinstance(output, Tensor):
                self._problems[part.name] = f"its output is a {type(output).__name__}, expected one tensor"
                return None
            return show(module, args, kwargs, output)

        return hook

    def _products(self, products: Sequence[Product]) -> list[Tensor | None]:
        return [self._tapped_pieces(product) for product in products]

    def _tapped_pieces(self, product: Product) -> Tensor | None:
        """The output of a product with a tap on what is to be captured of it."""
        pieces = [piece for piece in product.pieces if piece.name in self._parts]
        if len(pieces) == 1 and len(pieces[0].columns) == product.output.shape[-1]:
            return self._tapped(pieces[0], product.activation, product.output)
        tapped = product.output
        for piece in pieces:
            columns = piece.columns.to(tapped.device)
            own = self._tapped(piece, product.activation, product.output.index_select(-1, columns))
            tapped = tapped if own is None else tapped.index_copy(-1, columns, own)
        return None if tapped is product.output else tapped

    def _tapped(self, piece: Piece, activation: Tensor, output: Tensor) -> Tensor | None:
        """The output of a map, or of some of its features, with a tap on it."""
        name, part = piece.name, self._parts[piece.name]
        if not part.is_trainable:
            return None
        if not (torch.is_grad_enabled() and output.requires_grad):
            self._ran_without_grad.add(name)
            return None
        call = Call(name, current_labels(), recomputed=inside_backward())
        if not call.recomputed and self._evaluates_again(call):
            return None
        self._calls.append(call)
        if not call.recomputed:
            self._edges.append(torch.autograd.graph.get_gradient_edge(output))
        axes = part.input_axes or piece.axes_of_inputs
        inputs, outputs = piece.input_features(axes), piece.output_features(axes)
        adding = accumulator(part.parameters)

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
            wide_input = widened(activation.detach(), inputs, part.num_inputs)
            wide_grad = widened(grad_output.detach(), outputs, part.num_outputs)
            call.deliveries.append(Delivery(wide_input, wide_grad, self._scale, adds_up(adding)))

        tapped: Tensor = Tap.apply(output, activation.detach(), call, deliver)
        return tapped

    def _evaluates_again(self, call: Call) -> bool:
        """Whether the samples of a call have passed its module in this step, before its weights moved."""
        versions = tuple(parameter._version for parameter in self._parts[call.module_name].parameters)
        known = None if call.labels is None else call.labels.key
        return self._versions.setdefault((call.module_name, known), versions) != versions

    def _watch_inside(self, container: str, names: Sequence[str]) -> list[Any]:
        """Hooks that show the products inside a module that calls no module for them."""
        owner = self._model.get_submodule(container)
        start = len(container) + 1 if container else 0
        absolute = {name[start:]: name for name in names}

        def show(products: Sequence[Product]) -> list[Tensor | None]:
            return self._products([
                replace(product, pieces=tuple(replace(p, name=absolute[p.name]) for p in product.pieces))
                for product in products
            ])

        watcher = MapWatcher(owner, show, absolute)
        entered: list[MapWatcher] = []

        def enter(module: nn.Module, *_: object) -> None:
            if module is owner and not self._paused:
                entered.append(watcher.__enter__())

        def leave(*_: object) -> None:
            if entered:
                entered.pop().__exit__(None, None, None)

        return [
            owner.register_forward_pre_hook(_Hook(enter)),
            owner.register_forward_hook(_Hook(leave), always_call=True),
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
        for name, part in self._parts.items():
            if name in delivered:
                continue
            if name in self._batched:
                self._problems[name] = "its gradients were asked for several at once (is_grads_batched=True)"
            elif name in ran:
                self._problems[name] = "it ran forward, but no gradient of its output arrived"
            elif part.is_trainable and any(self._got_gradient(p) for p in part.parameters):
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

    def _collect(self, labels: Labels, calls: list[Call], terms: list[LossTerm]) -> CapturedStep:
        deliveries = [delivery for call in calls for delivery in call.deliveries]
        rows = {delivery.activation.shape[0] for delivery in deliveries}
        num_samples = labels.num_samples or deliveries[0].activation.shape[0]
        if labels.token_samples is None and len(rows) == 1:
            check_rows(rows.pop(), labels, terms)
        samples = labels.resolve(num_samples, self.numbering, self._rank, self._world_size)
        by_part: dict[str, list[Delivery]] = {}
        for call in calls:
            by_part.setdefault(call.module_name, []).extend(call.deliveries)
        sharing: dict[tuple[object, ...], dict[str, list[Delivery]]] = {}
        by_map = {name: own for name, one in self._maps.items() if (own := side_by_side(one, by_part))}
        for name, own in by_map.items():
            shape = next((tuple(d.activation.shape) for d in own if not fits(d, num_samples, labels)), None)
            if shape is not None:
                self._problems[name] = f"its input has shape {shape}, expected " + (
                    f"the first dimension to be the {num_samples} samples of the batch"
                    if labels.token_samples is None
                    else f"one token for each of the {labels.token_samples.numel()} entries of `token_samples`"
                )
            if not {name, *(part.name for part in self._maps[name].parts)} & self._problems.keys():
                sharing.setdefault(inputs_of(own), {})[name] = own
        scale = float(deliveries[0].scale)
        # What was delivered is let go as soon as it is copied: both together would be twice the memory.
        del deliveries, by_part, by_map
        for call in calls:
            call.deliveries.clear()
        tokens = dict(
            zip(sharing, token_orders(list(sharing.values()), num_samples, labels.token_samples), strict=True)
        )
        factors: dict[str, GradientFactors] = {}
        for inputs in tokens:
            factors |= join(sharing.pop(inputs), tokens[inputs], scale)
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


def _terms_of(terms: Sequence[LossTerm], calls: Sequence[Call]) -> list[LossTerm]:
    """Parts of the loss that some calls led to; without any, those whose calls are not seen."""
    own = [term for term in terms if term.owner in calls]
    return own or [term for term in terms if term.owner is None]
