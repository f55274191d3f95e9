"""The Fisher of new captured steps, folded in before the budget of the cache ends for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool
from torch import Tensor

from qkov_lightning.heads.projections import Projection
from qkov_lightning.scores.fisher import EmpiricalFisher
from qkov_lightning.store.files import CacheError
from qkov_lightning.store.processes import Processes
from qkov_lightning.store.stored import StoredGradients
from qkov_lightning.store.streaming import CacheReader, HeadGradients, head_gradients_of


class Folding:
    """The Fisher of one projection, some heads at a time.

    Args:
        stored: Says where the Fisher was written last time, and where it goes.
        projection: The projection.
        decay: Of a Fisher that begins now.
        device: Where the arithmetic runs.
    """

    def __init__(
        self, stored: StoredGradients, projection: Projection, decay: float, device: torch.device
    ) -> None:
        path = None if stored.window is not None else stored.previous_fisher_path(projection)
        self._stored, self._projection = stored, projection
        self._previous = EmpiricalFisher.load(path, device) if path else EmpiricalFisher(decay)
        self._parts: list[EmpiricalFisher] = []

    def fold(self, gradients: HeadGradients) -> EmpiricalFisher:
        """The Fisher of some heads with the steps that it did not hold."""
        fisher = self._previous.part(gradients.heads)
        fisher.fold(gradients, gradients.tasks, gradients.steps, self._stored.folded_until)
        self._parts.append(fisher)
        return fisher

    def mean(self, gradients: HeadGradients, counts: Bool[Tensor, sample]) -> EmpiricalFisher:
        """The Fisher of some heads that is the plain mean over some samples: a moving average of one step.

        Args:
            gradients: Of the heads.
            counts: Which samples.
        """
        fisher = EmpiricalFisher(decay=0.0)
        fisher.fold(gradients, gradients.tasks, [0 if one else -1 for one in counts.tolist()])
        self._parts.append(fisher)
        return fisher

    def save(self) -> None:
        """Write the Fisher of all heads."""
        whole = EmpiricalFisher.joined(self._parts) if self._parts else self._previous
        if whole.tasks:
            whole.save(self._stored.fisher_path(self._projection))


@contextmanager
def disk_errors(stored: StoredGradients, failures: list[CacheError]) -> Iterator[None]:
    """Collect what goes wrong with the disk, for all processes to hear of."""
    try:
        stored.fisher_directory.mkdir(parents=True, exist_ok=True)
        yield
    except CacheError as error:
        failures.append(error)
    except OSError as error:
        failures.append(CacheError(f"The Fisher cannot be written to {stored.fisher_directory}: {error}"))


def fold_fisher(
    stored: StoredGradients,
    projections: Sequence[Projection],
    decay: float,
    processes: Processes,
    device: torch.device,
) -> None:
    """Fold the steps that the Fisher does not hold, without a measurement.

    Args:
        stored: What was captured.
        projections: Whose Fisher.
        decay: Of a Fisher that begins now.
        processes: Each takes some layers.
        device: Where the arithmetic runs.

    Raises:
        CacheError: If something cannot be read or written.
    """
    records = stored.cache.unfolded()
    reader = CacheReader(records, device)
    failures: list[CacheError] = []
    with disk_errors(stored, failures):
        stored.check(records)
        for projection in projections:
            if processes.takes(projection.layer):
                folding = Folding(stored, projection, decay, reader.device)
                for gradients in head_gradients_of(reader, stored.as_kept(projection)):
                    folding.fold(gradients)
                folding.save()
    processes.agree(failures[0] if failures else None)
