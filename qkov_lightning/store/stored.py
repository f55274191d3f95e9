"""What a measurement reads: samples of a cache, the weights that it kept, sums, and the Fisher so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Bool, Float
from torch import Tensor

from qkov_lightning.heads.projections import Projection
from qkov_lightning.store.cache import GradientCache
from qkov_lightning.store.files import CacheError
from qkov_lightning.store.records import CacheRecord
from qkov_lightning.store.sampling import Coordinates, stored_name, stored_projection
from qkov_lightning.store.window import Window


@dataclass(frozen=True)
class StoredGradients:
    """Gradients on disk, ready to be measured.

    Attributes:
        cache: Samples of all processes.
        fisher_directory: Where the Fisher is written, a file per projection.
        previous_fisher: Where it was written last time.
        folded_until: First captured step that the previous Fisher does not hold.
        coordinates: Weights that the cache holds of each head; None if it holds all of them.
        window: The samples that are measured, with their sums; None for the newest ones, without.
    """

    cache: GradientCache
    fisher_directory: Path
    previous_fisher: Path | None = None
    folded_until: int = 0
    coordinates: Coordinates | None = None
    window: Window | None = None

    def selected(self) -> list[tuple[CacheRecord, Bool[Tensor, sample]]]:
        """The records that are measured, oldest first, with a mask of the samples that count."""
        return self.cache.records(None if self.window is None else self.window.masks)

    def as_kept(self, projection: Projection) -> Projection:
        """The projection with the features that its heads have in the cache."""
        return projection if self.coordinates is None else stored_projection(projection)

    def weights(
        self, projection: Projection, heads: slice
    ) -> Float[Tensor, "head replicate coordinate"] | None:
        """How many weights each kept one stands for; None if all are kept."""
        if self.coordinates is None:
            return None
        return self.coordinates.slices[stored_name(projection)].weight[heads]

    def kept_of(
        self, whole: Float[Tensor, "head weight"], projection: Projection, heads: slice
    ) -> Float[Tensor, "own kept"]:
        """What belongs to the kept weights, of values for all weights of a projection."""
        if self.coordinates is None:
            return whole[heads]
        drawn = self.coordinates.slices[stored_name(projection)]
        num_other = drawn.slice_size // projection.head_dim
        index = (drawn.own * num_other + drawn.other)[heads].flatten(1)
        return whole[heads].gather(1, index.to(whole.device))

    def means(
        self, projection: Projection, heads: slice, tasks: Sequence[str], counts: Sequence[int]
    ) -> Float[Tensor, "3 task head weight"] | None:
        """Means of gradients, magnitudes and squares over the samples of each task, at all weights.

        Args:
            projection: The projection.
            heads: Which heads.
            tasks: The tasks.
            counts: Samples of each that are measured.

        Returns:
            The means; None if there are no sums of just these samples.

        Raises:
            CacheError: If they cannot be read.
        """
        whole = None if self.window is None else self.window.means(stored_name(projection), tasks, counts)
        return None if whole is None else whole[:, :, heads]

    def fisher_path(self, projection: Projection) -> Path:
        """Where the Fisher of a projection is written."""
        return self.fisher_directory / _fisher_name(projection)

    def previous_fisher_path(self, projection: Projection) -> Path | None:
        """Where the Fisher of a projection was written last time; None if it was not."""
        path = None if self.previous_fisher is None else self.previous_fisher / _fisher_name(projection)
        return path if path is not None and path.exists() else None

    def check(self, records: Sequence[CacheRecord]) -> None:
        """Refuse records of other weights.

        Raises:
            CacheError: If there is one.
        """
        expected = None if self.coordinates is None else self.coordinates.fingerprint
        for record in records:
            if record.fingerprint != expected:
                kinds = [
                    "exact factors" if mark is None else f"gradients at the sampled weights {mark}"
                    for mark in (record.fingerprint, expected)
                ]
                raise CacheError(
                    f"Cache file {record.path} holds {kinds[0]}, expected {kinds[1]}. Give each run a cache directory of "
                    "its own."
                )


def _fisher_name(projection: Projection) -> str:
    return f"{projection.layer:04d}-{projection.block}.safetensors"
