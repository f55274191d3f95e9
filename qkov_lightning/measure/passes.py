"""Pass after pass over the same samples of a probe, each with the gradients of some projections.

Every pass begins with the same random numbers and leaves the model as it was, so that it sees the same
batches and the same gradients as the one before. A batch that comes out otherwise is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from qkov_lightning.capture.factors import CapturedStep
from qkov_lightning.capture.reading import summing_device
from qkov_lightning.capture.reductions import ReductionChoice
from qkov_lightning.capture.rehearsal import Loss, rehearsing, reseed, to_device
from qkov_lightning.capture.samples import Labels, Samples
from qkov_lightning.capture.taps import GradientCapture
from qkov_lightning.heads.projections import Projection

Probe = DataLoader[Any] | Sequence[Any]
"""A DataLoader, several of them, or batches in a list."""

Visit = Callable[[int, CapturedStep], None]
"""Takes the place of the first sample of a step among all samples, and the step."""


class OtherSamplesError(Exception):
    """A forward pass held other samples than its batch says: it ran inside ``with task(...)``, say."""


@dataclass(frozen=True)
class ProbeSamples:
    """Who the samples of a probe are, in order.

    Attributes:
        steps: Samples of each labelled forward pass of each batch.
        fingerprint: Of the contents of all batches.
    """

    steps: tuple[tuple[Samples, ...], ...]
    fingerprint: str

    def __len__(self) -> int:
        return sum(len(samples) for samples in self.all)

    @property
    def all(self) -> list[Samples]:
        """Samples of every forward pass."""
        return [samples for batch in self.steps for samples in batch]

    @property
    def tasks(self) -> list[str]:
        """Task of every sample."""
        return [task for samples in self.all for task in samples.tasks]

    @property
    def ids(self) -> list[str]:
        """Identifier of every sample."""
        return [name for samples in self.all for name in samples.ids]

    @property
    def groups(self) -> list[str | None]:
        """Group of every sample; None where none was given."""
        return [group for samples in self.all for group in samples.groups or (None,) * len(samples)]

    @property
    def texts(self) -> list[str | None]:
        """Text of every sample, where texts are kept."""
        return [text for samples in self.all for text in samples.texts or (None,) * len(samples)]


class ProbePasses:
    """Runs a model over the batches of a probe, as often as somebody asks.

    Args:
        model: Holds the projections.
        probe: Batches of the same samples each time.
        loss: Loss of the model on a batch.
        loss_reduction: How the loss joins the samples of a batch.
        labels: Labels of a batch.

    Attributes:
        device: Where the model runs.
        summing_device: Where the arithmetic of the scores runs.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        loss: Loss,
        loss_reduction: ReductionChoice,
        labels: Callable[[Any], Labels],
    ) -> None:
        self._model, self._probe, self._loss = model, probe, loss
        self._loss_reduction, self._labels = loss_reduction, labels
        self._contents: list[bytes] = []
        self._samples: ProbeSamples | None = None
        self.device = next(model.parameters()).device
        self.summing_device = summing_device(self.device)

    def look(self) -> ProbeSamples | None:
        """Who the samples are, without a forward pass; None where only a forward pass can tell.

        Raises:
            ValueError: If there are none, or one repeats.
        """
        steps: list[tuple[Samples, ...]] | None = []
        numbering: Counter[str] = Counter()
        seen: Counter[tuple[str, str]] = Counter()
        contents, fingerprint = [], hashlib.sha256()
        with rehearsing(self._model, evaluation=True):
            for index, batch in enumerate(_batches(self._probe)):
                _fingerprint(batch, fingerprint.update)
                contents.append(fingerprint.digest())
                samples = self._read(batch, numbering)
                if samples is None:
                    steps = None
                elif steps is not None:
                    _check_unique(samples, index, seen)
                    steps.append((samples,))
        self._contents = contents
        if not contents:
            raise ValueError("The probe holds no batch, expected at least two samples of each task.")
        self._samples = None if steps is None else ProbeSamples(tuple(steps), fingerprint.hexdigest()[:16])
        return self._samples

    def learn(self, projections: Sequence[Projection]) -> ProbeSamples:
        """Who the samples are, from forward and backward passes whose gradients nobody looks at.

        Raises:
            ValueError: If a batch cannot be measured, or a sample repeats.
        """
        self._samples = None
        seen: Counter[tuple[str, str]] = Counter()
        steps = []

        def note(index: int, captured: Sequence[CapturedStep]) -> None:
            for step in captured:
                _check_unique(step.samples, index, seen)
            steps.append(tuple(step.samples for step in captured))

        self._pass(projections, note)
        self._samples = ProbeSamples(tuple(steps), self._contents[-1].hex()[:16])
        return self._samples

    def run(self, projections: Sequence[Projection], visit: Visit) -> set[int]:
        """One pass.

        Args:
            projections: Whose gradients are captured; the backward pass ends at the lowest of them.
            visit: Called with each captured step, in order, with gradients off and in full precision.

        Returns:
            Places of the batches in which none of them took part.

        Raises:
            ValueError: If the samples are not known yet, if a batch differs from the first time, or if a loss
                or a gradient is not finite.
            OtherSamplesError: If a forward pass holds other samples than were expected.
        """
        if self._samples is None:
            raise ValueError("Nobody knows the samples yet: call `look` or `learn` first.")
        unseen = set()
        starts = _starts(self._samples)

        def hand_over(index: int, captured: Sequence[CapturedStep]) -> None:
            if not captured:
                unseen.add(index)
                return
            places = {_key(samples): start for samples, start in starts[index]}
            for step in captured:
                if _key(step.samples) not in places:
                    raise OtherSamplesError
                with torch.no_grad(), without_autocast(self.device):
                    visit(places[_key(step.samples)], step)

        self._pass(projections, hand_over)
        return unseen

    def _pass(
        self,
        projections: Sequence[Projection],
        take: Callable[[int, Sequence[CapturedStep]], None],
    ) -> None:
        """Forward and backward passes, batch after batch.

        Raises:
            ValueError: If the batches differ from those of the first time, or a loss or a gradient is not
                finite.
        """
        fingerprint, count = hashlib.sha256(), 0
        with (
            rehearsing(self._model, evaluation=True),
            GradientCapture(self._model, projections, self._loss_reduction) as capture,
            torch.enable_grad(),
        ):
            for index, batch in enumerate(_batches(self._probe)):
                _fingerprint(batch, fingerprint.update)
                if self._contents[index : index + 1] != [fingerprint.digest()]:
                    raise ValueError(_other(f"Batch {index} is another one"))
                take(index, self._step(capture, index, batch))
                count += 1
        if count < len(self._contents):
            raise ValueError(_other(f"{count} of its {len(self._contents)} batches come"))

    def _step(self, capture: GradientCapture, index: int, batch: Any) -> list[CapturedStep]:
        batch = to_device(self._model, batch, self.device)
        # The model's random numbers are apart from those of the batches, which a look alone draws, too.
        reseed(2 * index + 1)
        capture.start()
        value = self._loss(self._model, batch)
        _check_loss(value, index)
        capture.note_loss(value)
        if capture.edges:
            # Not `backward()`: it would add to `.grad`, and run optimisers that hang on it.
            torch.autograd.grad(value, capture.edges, allow_unused=True)
        del value
        captured = capture.finish(lambda: self._labels(batch))
        if not all(one.is_finite for one in captured):
            raise ValueError(
                f"Batch {index} of the probe has a gradient that is not finite. A measurement without it would pass "
                "over what broke."
            )
        return captured

    def _read(self, batch: Any, numbering: Counter[str]) -> Samples | None:
        try:
            labels = self._labels(batch)
            return None if labels.num_samples is None else labels.resolve(labels.num_samples, numbering)
        except ValueError:  # the forward pass may know better, or will say what is wrong
            return None


def _other(what: str) -> str:
    return (
        f"{what} when the probe is read again, expected the same samples each time: give a DataLoader whose dataset "
        "draws nothing at random, or a list of batches."
    )


def _key(samples: Samples) -> tuple[object, ...]:
    return samples.tasks, samples.ids, samples.groups


def _starts(samples: ProbeSamples) -> list[list[tuple[Samples, int]]]:
    """Place of the first sample of every forward pass."""
    starts, count = [], 0
    for batch in samples.steps:
        own = []
        for one in batch:
            own.append((one, count))
            count += len(one)
        starts.append(own)
    return starts


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The arithmetic of the scores is not the model's: no mixed precision."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def first_batch(probe: Probe) -> Any:
    """The first batch of a probe.

    Raises:
        ValueError: If there is none.
    """
    for batch in _batches(probe):
        return batch
    raise ValueError("The probe holds no batch, expected at least two samples of each task.")


def _batches(probe: Probe) -> Iterator[Any]:
    """The batches of all loaders, whose own generators are left as they were.

    Raises:
        ValueError: If a loader draws its samples at random.
    """
    loaders: list[Any] = [probe]
    if isinstance(probe, Sequence) and any(isinstance(one, DataLoader) for one in probe):
        loaders = list(probe)
    index = 0
    for loader in loaders:
        sampler = getattr(loader, "sampler", None)
        if isinstance(sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)):
            raise ValueError(
                f"The probe draws its samples at random ({type(sampler).__name__}), expected the same samples each time: "
                "build its DataLoader with shuffle=False."
            )
        generator = getattr(loader, "generator", None)
        state = None if generator is None else generator.get_state()
        try:
            reseed(2 * index)
            for batch in loader:
                yield batch
                index += 1
                reseed(2 * index)
        finally:
            if generator is not None:
                generator.set_state(state)


def _fingerprint(value: Any, update: Callable[[bytes], None]) -> None:
    """Feed a hash with every tensor, array, text and number of a batch, and where it lies."""
    if isinstance(value, Tensor):
        update(f"{value.dtype}{tuple(value.shape)}".encode())
        update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            update(repr(key).encode())
            _fingerprint(item, update)
    elif isinstance(value, (list, tuple)):
        update(f"{len(value)}".encode())
        for item in value:
            _fingerprint(item, update)
    elif isinstance(value, (str, bytes, int, float, bool, type(None))):
        update(repr(value).encode())
    else:
        _fingerprint(getattr(value, "__dict__", None), update)


def _check_loss(value: object, index: int) -> None:
    where = f"The loss of batch {index} of the probe"
    if not isinstance(value, Tensor) or not value.requires_grad:
        kind = "has no gradient" if isinstance(value, Tensor) else f"is a {type(value).__name__}"
        raise ValueError(f"{where} {kind}, expected a tensor that depends on the parameters.")
    if value.numel() != 1 or not bool(value.isfinite()):
        raise ValueError(f"{where} is {value.detach().tolist()}, expected one finite number.")


def _check_unique(samples: Samples, index: int, seen: Counter[tuple[str, str]]) -> None:
    seen.update(zip(samples.tasks, samples.ids, strict=True))
    (task, sample), count = seen.most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"Sample {sample!r} of task {task!r} is in the probe {count} times (again in batch {index}), expected every "
            "sample once with an identifier of its own."
        )
