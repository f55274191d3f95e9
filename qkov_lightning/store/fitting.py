"""What may be used, and which storage fits: exact gradients, sums with sampled weights, or these alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qkov_lightning.store.sum_memory import sums_disk_bytes

Chosen = Literal["factors", "summed", "sampled"]


@dataclass(frozen=True)
class Budget:
    """What a recording may use.

    Attributes:
        max_samples_per_task: Samples of each task that a heatmap rests on.
        max_bytes: Disk for the cache, over all processes; half of it is for what checkpoints need.
        max_memory_bytes: For sums, in each process.
    """

    max_samples_per_task: int
    max_bytes: int
    max_memory_bytes: int


@dataclass(frozen=True)
class Demand:
    """What a sample and its sums take.

    Attributes:
        exact: Bytes of a sample in exact storage.
        sampled: Bytes of a sample in sampled storage.
        num_weights: Weights of all heads.
        num_tasks: Tasks.
        itemsize: Bytes of a number of a sum.
    """

    exact: int | float
    sampled: int
    num_weights: int
    num_tasks: int
    itemsize: int = 4


@dataclass(frozen=True)
class StorageFit:
    """The first storage that fits, and what each would take.

    Attributes:
        chosen: The storage.
        exact_bytes: On disk, of the samples in exact storage.
        summed_bytes: On disk, of summed storage.
        num_tasks: Tasks.
        budget: What may be used.
    """

    chosen: Chosen
    exact_bytes: int | float
    summed_bytes: int
    num_tasks: int
    budget: Budget

    @classmethod
    def of(cls, demand: Demand, budget: Budget, num_processes: int = 1) -> StorageFit:
        """Exact storage, unless it exceeds its budget and sampled weights are smaller; with sums if they fit.

        Args:
            demand: What is needed.
            budget: What may be used.
            num_processes: How many share the cache; each has sums of its own.
        """
        num_samples = budget.max_samples_per_task * demand.num_tasks
        exact_bytes = demand.exact * num_samples
        sums = sums_disk_bytes(demand.num_weights, demand.num_tasks, budget.max_memory_bytes, demand.itemsize)
        # Checkpoints may need as many samples as the heatmap.
        summed_bytes = num_processes * sums + 2 * demand.sampled * num_samples
        chosen: Chosen = "factors"
        if exact_bytes > budget.max_bytes // 2 and demand.sampled < demand.exact:
            chosen = "summed" if summed_bytes <= budget.max_bytes else "sampled"
        return cls(chosen, exact_bytes, summed_bytes, demand.num_tasks, budget)

    def __str__(self) -> str:
        size = self.budget.max_bytes / 2**30
        reason = (
            f"exact gradients take {self.exact_bytes / 2**30:.3g} GiB for {self.budget.max_samples_per_task} samples of "
            f"{self.num_tasks} tasks, and max_cache_gb={size:g} leaves {size / 2:.3g} GiB for them"
        )
        if self.chosen == "factors":
            return f"exact storage; {reason}"
        sums = f"sums with sampled weights take up to {self.summed_bytes / 2**30:.3g} GiB"
        if self.chosen == "summed":
            return f"summed storage; {reason}; {sums}"
        return f"sampled storage; {reason}, and {sums}. Scores other than interference and relative are rough"
