"""What each way to measure a model costs, before anything runs: disk, memory and time.

Times are products of counts and of two speeds of this machine, which a short trial tells: they are right
within a factor of two where nothing else runs. A forward pass takes two operations per weight and token, and
so does the backward pass to the inputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor, nn

from qkov_lightning.capture.gradients import BLOCK_BYTES
from qkov_lightning.heads.inspection import cache_bytes_per_sample
from qkov_lightning.heads.maps import find_map
from qkov_lightning.heads.projections import Projection
from qkov_lightning.measure.allotment import Plan, Replicates, heads_of, numbers_per_weight
from qkov_lightning.measure.jackknife import MAX_GROUPS
from qkov_lightning.store.fitting import Budget, Demand, StorageFit
from qkov_lightning.store.generations import KINDS
from qkov_lightning.store.sampling import NUM_COORDINATES, sampled_bytes
from qkov_lightning.store.streaming import HELD_BYTES
from qkov_lightning.store.sum_memory import sums_bytes

SCORE_STEPS = {"cache": 70, "sums": 12, "linear": 80, "exact": 60}
"""Elementwise operations for each weight and sample, in all passes; of exact replicates, for each of them."""


@dataclass(frozen=True)
class Speed:
    """How fast a machine computes.

    Attributes:
        products: Multiplications and additions a second in a product of matrices.
        elements: Elements a second that an elementwise operation writes.
    """

    products: float
    elements: float

    @classmethod
    def of(cls, device: torch.device) -> Speed:
        """Tried out on a device, in about a second."""
        device = torch.device("cpu") if device.type == "meta" else device
        left, right = torch.randn(2, 1024, 1024, device=device)
        some = torch.randn(2**19, device=device)
        out = torch.empty_like(some)
        products = _rate(lambda: left @ right, 2 * 1024**3, device)
        return cls(products, _rate(lambda: torch.mul(some, some, out=out), some.numel(), device))


def _rate(work: Callable[[], Tensor], size: int, device: torch.device, seconds: float = 0.3) -> float:
    """Of the fastest of many trials: others may be slow because of what else runs."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return size / best


@dataclass(frozen=True)
class Cost:
    """What one way to measure costs.

    Attributes:
        way: Its name.
        disk_bytes: On disk, for all samples.
        memory_bytes: In memory beside the model and its activations.
        seconds: Of one measurement of all samples.
        remark: What else to know.
    """

    way: str
    disk_bytes: int
    memory_bytes: int
    seconds: float
    remark: str = ""


@dataclass(frozen=True)
class Samples:
    """What is to be measured.

    Attributes:
        num_samples: Samples of each task.
        num_tasks: Tasks.
        num_tokens: Tokens of a sample.
    """

    num_samples: int = 128
    num_tasks: int = 2
    num_tokens: int = 512

    @property
    def count(self) -> int:
        """Samples of all tasks."""
        return self.num_samples * self.num_tasks


def costs_of(
    model: nn.Module,
    projections: Sequence[Projection],
    samples: Samples,
    speed: Speed,
    max_cache_gb: float = 10.0,
    max_memory_gb: float = 4.0,
) -> list[Cost]:
    """The cost of a heatmap from each storage, and from a probe with each kind of replicates.

    Args:
        model: Holds the projections; it may lie on the meta device.
        projections: What would be measured.
        samples: How many samples, of which length.
        speed: Of the machine.
        max_cache_gb: Disk for the cache, in GiB.
        max_memory_gb: Memory for the sums of a probe, in GiB.
    """
    trained = [one for one in projections if find_map(model, one).is_trainable]
    heads = heads_of(model, trained, 4)
    num_weights = sum(one.size for one in heads)
    exact = cache_bytes_per_sample(model, samples.num_tokens, projections)
    sampled = sampled_bytes(trained)
    max_memory_bytes = int(max_memory_gb * 2**30)
    budget = Budget(samples.num_samples, int(max_cache_gb * 2**30), max_memory_bytes)
    fit = StorageFit.of(Demand(exact, sampled, num_weights, samples.num_tasks), budget)
    sums = sums_bytes(num_weights, samples.num_tasks)
    largest = max((_weights(model, one) for one in trained), default=0)
    fisher = 4 * samples.num_tasks * largest
    outer = 2 * num_weights * samples.num_tokens / speed.products
    kept = NUM_COORDINATES * sum(one.num_heads for one in trained)
    result = [
        Cost(
            "cache, exact",
            exact * samples.count,
            HELD_BYTES + fisher,
            samples.count * (outer + SCORE_STEPS["cache"] * num_weights / speed.elements),
            _auto(fit.chosen == "factors", f"{exact / 1e6:.3g} MB a sample"),
        ),
        Cost(
            "cache, summed",
            fit.summed_bytes,
            HELD_BYTES + len(KINDS) * fisher + (sums if sums <= max_memory_bytes else 0),
            samples.count
            * (
                outer
                + SCORE_STEPS["sums"] * num_weights / speed.elements
                + SCORE_STEPS["cache"] * kept / speed.elements
            ),
            _auto(
                fit.chosen == "summed", f"{3 * samples.num_tasks} numbers a weight, summed in captured steps"
            ),
        ),
        Cost(
            "cache, sampled",
            sampled * samples.count,
            HELD_BYTES + fisher,
            samples.count * SCORE_STEPS["cache"] * kept / speed.elements,
            _auto(fit.chosen == "sampled", f"{sampled / 1e6:.3g} MB a sample"),
        ),
    ]
    groups = min(MAX_GROUPS, samples.num_samples)
    numbers = numbers_per_weight(samples.num_tasks, ("compare",), groups)
    fits = 4 * numbers * num_weights <= max_memory_bytes
    kinds: tuple[Replicates, ...] = ("exact", "linear")
    for kind in kinds:
        try:
            plan = Plan.of(heads, samples.num_tasks, kind, groups, max_memory_bytes // 4)
        except ValueError:
            continue  # not even in many sweeps
        steps = SCORE_STEPS[kind] * (1 + groups if kind == "exact" else 1)
        operations = 0.0
        for swept in (
            [sweep.heads[place] for place in one.stages] for sweep in plan.sweeps for one in sweep.passes
        ):
            operations += _pass_operations(model, swept[-1].projection, projections)
            operations += 2 * sum(one.size for one in swept)
        seconds = operations * samples.num_tokens / speed.products
        result.append(
            Cost(
                f"probe, {kind} replicates",
                0,
                4 * plan.max_numbers + 2 * BLOCK_BYTES,
                samples.count * (seconds + steps * num_weights / speed.elements),
                _auto((kind == "exact") == fits, f"{plan}, {_most(plan):.3g} numbers a weight"),
            )
        )
    return result


def cost_table(model: nn.Module, costs: Sequence[Cost], samples: Samples) -> Table:
    """The costs as a table for Rich."""
    table = Table(
        title=f"A heatmap of {samples.num_samples} samples of {samples.num_tokens} tokens of each of "
        f"{samples.num_tasks} tasks",
        title_justify="left",
    )
    for column in ("way", "disk", "memory", "time", ""):
        table.add_column(column, justify="left" if column in ("way", "") else "right")
    for cost in costs:
        table.add_row(
            cost.way,
            _gigabytes(cost.disk_bytes),
            _gigabytes(cost.memory_bytes),
            _duration(cost.seconds),
            cost.remark,
        )
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    table.caption_justify = "left"
    table.caption = (
        f"memory beside the model's {_gigabytes(size)} and its activations; times from a trial of this machine, within "
        "a factor of two"
    )
    return table


def _weights(model: nn.Module, projection: Projection) -> int:
    one = find_map(model, projection)
    return projection.head_features.numel() * (one.num_outputs if projection.block == "O" else one.num_inputs)


def _pass_operations(model: nn.Module, lowest: Projection, projections: Sequence[Projection]) -> float:
    """Operations per token of a forward pass, and of a backward pass down to a layer."""
    tables: set[int] = set()
    matrices: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                tables.add(id(parameter))
            else:
                matrices[id(parameter)] = parameter.numel()
    # An embedding that is no head as well is looked up, not multiplied with.
    whole = sum(matrices.values())
    head = sum(size for key, size in matrices.items() if key in tables)
    num_layers = 1 + max(one.layer for one in projections)
    reached = 1 - lowest.layer / num_layers
    return 2 * (whole + head + (whole - head) * reached)


def _most(plan: Plan) -> float:
    """Numbers that are kept of each weight at most."""
    return max(
        (
            one.numbers / sum(heads.size for heads in sweep.heads)
            for sweep in plan.sweeps
            for one in sweep.passes
        ),
        default=0.0,
    )


def _auto(chosen: bool, remark: str) -> str:
    return f"{remark}; what auto takes" if chosen else remark


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g} GiB" if num_bytes else "none"


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"
