"""The diagonal empirical Fisher of one projection: an EMA per task over captured steps."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qkov_lightning.scores.spans import weighted_squares
from qkov_lightning.store.files import CacheError, write_durably


class EmpiricalFisher:
    r"""Bias-corrected EMA of squared per-sample gradients, per task.

    For each captured step that holds samples of task t,

    .. math:: F_t \leftarrow \beta F_t + (1 - \beta) \operatorname{mean}_i g_i^2,
              \qquad \hat F_t = F_t / (1 - \beta^{n_t})

    with n_t the number of such steps (the correction of Adam, Kingma & Ba 2015). This is the *empirical*
    Fisher: gradients of the observed targets, not of targets drawn from the model (Kunstner et al. 2019,
    arXiv:1905.12558).

    Args:
        decay: :math:`\beta`, in [0, 1). The memory is about ``1 / (1 - decay)`` captured steps.

    Raises:
        ValueError: If ``decay`` is outside [0, 1).
    """

    def __init__(self, decay: float = 0.95) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}, expected 0 <= decay < 1.")
        self.decay = decay
        self._average: dict[str, Tensor] = {}
        self._num_steps: dict[str, int] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that were seen."""
        return tuple(sorted(self._average))

    def update(self, gradients: Float[Tensor, sample * weight], tasks: Sequence[str]) -> None:
        """Fold in the samples of one captured step.

        Args:
            gradients: Per-sample gradients, of the same weights at every call.
            tasks: Task of each sample.

        Raises:
            ValueError: If there is not one task per sample.
        """
        if len(tasks) != gradients.shape[0]:
            raise ValueError(f"{len(tasks)} tasks for {gradients.shape[0]} samples, expected one per sample.")
        self.fold([gradients], tasks, [0] * len(tasks))

    def fold(
        self,
        blocks: Iterable[Float[Tensor, sample * some_weights]],
        tasks: Sequence[str],
        steps: Sequence[int],
        first_step: int = 0,
    ) -> None:
        r"""Fold in the samples of several captured steps, with the result of the recursion over them.

        After the m steps that hold samples of a task, the recursion has become a sum over samples:

        .. math:: F_t \leftarrow \beta^m F_t
                  + \sum_{j=1}^{m} (1 - \beta) \beta^{m - j} \operatorname{mean}_{i \in j} g_i^2

        Args:
            blocks: Per-sample gradients of all samples, block after block along the last axis.
            tasks: Task of each sample.
            steps: Captured step of each sample.
            first_step: The first step that is not folded in yet.
        """
        num_steps, coefficients = self._coefficients(tasks, steps, first_step)
        if not num_steps:
            return
        new = weighted_squares(blocks, coefficients)
        # A run may go on in another precision.
        self._average = {task: average.to(new.dtype) for task, average in self._average.items()}
        for (task, count), share in zip(num_steps.items(), new, strict=True):
            before = self._average.get(task)
            # A tensor of its own in either case: a view would keep the shares of all tasks in memory.
            total = share.clone() if before is None else share.add(before, alpha=self.decay**count)
            self._average[task] = total
            self._num_steps[task] = self._num_steps.get(task, 0) + count

    def _coefficients(
        self, tasks: Sequence[str], steps: Sequence[int], first_step: int
    ) -> tuple[dict[str, int], Float[Tensor, "task sample"]]:
        """New steps of each task, and what the square of each sample is multiplied with."""
        counts = Counter((task, step) for task, step in zip(tasks, steps, strict=True) if step >= first_step)
        num_steps: Counter[str] = Counter()
        places = {}
        for task, step in sorted(counts, key=lambda one: one[1]):
            places[task, step] = num_steps[task]
            num_steps[task] += 1
        coefficients = torch.zeros(len(num_steps), len(tasks), dtype=torch.float64)
        for sample, (task, step) in enumerate(zip(tasks, steps, strict=True)):
            if step >= first_step:
                num_later = num_steps[task] - 1 - places[task, step]
                share = (1 - self.decay) * self.decay**num_later / counts[task, step]
                coefficients[list(num_steps).index(task), sample] = share
        return dict(num_steps), coefficients

    def shares(self, tasks: Sequence[str], steps: Sequence[int]) -> Float[Tensor, sample]:
        """Share of each sample's square in ``pooled``, the sum over all samples ever folded being 1.

        Args:
            tasks: Task of each sample, all of them folded.
            steps: Captured step of each sample; with all newer samples of a step and its task.
        """
        _, coefficients = self._coefficients(tasks, steps, min(steps, default=0))
        known = {task: 1 - self.decay**count for task, count in self._num_steps.items()}
        shares = coefficients.sum(dim=0)
        total = torch.tensor([known[task] for task in tasks], dtype=torch.float64)
        return shares / total / len(self._num_steps)

    def estimate(self, task: str) -> Float[Tensor, "*weight"]:
        """Bias-corrected Fisher of one task, in squared loss per squared unit of weight.

        Raises:
            ValueError: If no sample of the task was seen.
        """
        if task not in self._average:
            raise ValueError(
                f"No sample of task {task!r} was seen; the Fisher knows {', '.join(self.tasks) or 'none'}."
            )
        return self._average[task] / (1 - self.decay ** self._num_steps[task])

    def pooled(self) -> Float[Tensor, "*weight"]:
        """Mean of the tasks' Fishers: every task weighs the same, whatever its share of the batches.

        Pooling is what keeps the reference task in the score: divided by its own Fisher, a task's mean
        squared gradient is 1 at every weight.

        Raises:
            ValueError: If no sample was seen.
        """
        if not self._average:
            raise ValueError("The Fisher has seen no sample yet: call update first.")
        return torch.stack([self.estimate(task) for task in self.tasks]).mean(dim=0)

    def part(self, heads: slice) -> EmpiricalFisher:
        """The Fisher of some heads, if the first axis of the weights is the head; a copy."""
        part = EmpiricalFisher(self.decay)
        part._num_steps = dict(self._num_steps)
        part._average = {task: average[heads].clone() for task, average in self._average.items()}
        return part

    @classmethod
    def joined(cls, parts: Sequence[EmpiricalFisher]) -> EmpiricalFisher:
        """Inverse of ``part``, for parts that have seen the same steps."""
        whole = cls(parts[0].decay)
        whole._num_steps = dict(parts[0]._num_steps)
        whole._average = {task: torch.cat([part._average[task] for part in parts]) for task in parts[0].tasks}
        return whole

    def save(self, path: Path) -> None:
        """Write to a safetensors file, completely or not at all.

        Raises:
            CacheError: If the disk refuses.
        """
        header = {"decay": self.decay, "num_steps": self._num_steps}
        names = {f"{index}": task for index, task in enumerate(self.tasks)}
        tensors = {index: self._average[task].cpu().contiguous() for index, task in names.items()}
        write_durably(path, tensors, {"qkov_fisher": json.dumps({**header, "tasks": names})})

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> EmpiricalFisher:
        """Read what ``save`` wrote.

        Raises:
            CacheError: If the file is missing or is no Fisher.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads(file.metadata()["qkov_fisher"])
                fisher = cls(header["decay"])
                fisher._num_steps = {task: int(steps) for task, steps in header["num_steps"].items()}
                tensors = {task: file.get_tensor(index) for index, task in header["tasks"].items()}
                fisher._average = {task: tensor.to(device) for task, tensor in tensors.items()}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CacheError(f"Fisher file {path} cannot be read: {error}") from error
        return fisher
