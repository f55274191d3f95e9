"""Captured gradients against batch-of-one autograd, on a model and batch of any kind."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qkov_lightning.capture.factors import CapturedStep
from qkov_lightning.capture.gradients import head_gradients, select_samples
from qkov_lightning.capture.reductions import ReductionChoice
from qkov_lightning.capture.rehearsal import Loss
from qkov_lightning.capture.samples import Labels, read_labels
from qkov_lightning.capture.single_sample import WeightGradients, take_sample
from qkov_lightning.capture.taps import CaptureWarning, GradientCapture
from qkov_lightning.heads.maps import LinearMap, find_map
from qkov_lightning.heads.projections import Projection

FLOOR = 1e-3
"""Share of a sample's whole gradient below which a cell's own norm is no measure: its digits are rounding."""


@dataclass(frozen=True)
class CellError:
    """How far the captured gradients of one cell are from autograd.

    Attributes:
        projection: Layer and block.
        head: Head of the block, from 0.
        error: Largest relative error over the samples; None where there is no gradient to compare, because
            the projection is frozen or took no part in the loss.
    """

    projection: Projection
    head: int
    error: float | None


@dataclass(frozen=True)
class CaptureVerification:
    """Outcome of ``verify_capture``.

    Attributes:
        cells: One per layer, block and head.
        tolerance: Relative error up to which a cell passes.
        num_samples: Samples that were compared.
        reasons: What explains the mismatch, if there is one, and what could not be captured.
    """

    cells: tuple[CellError, ...]
    tolerance: float
    num_samples: int
    reasons: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[CellError, ...]:
        """The cells that differ from autograd."""
        return tuple(
            cell for cell in self.cells if cell.error is not None and not cell.error <= self.tolerance
        )

    @property
    def passed(self) -> bool:
        """Whether there was something to compare, and all of it agrees."""
        return not self.failures and any(cell.error is not None for cell in self.cells)

    @property
    def summary(self) -> str:
        """One line, and one for each reason."""
        compared = sum(cell.error is not None for cell in self.cells)
        line = (
            f"{compared - len(self.failures)} of {compared} cells agree with batch-of-one autograd: {self.num_samples} "
            f"samples, relative errors up to {self.tolerance:.1e} allowed."
        )
        return "\n".join([line, *(f"- {reason}" for reason in self.reasons)])

    def __str__(self) -> str:
        rows = [
            f"{layer:<4}{block} {module}: {error} {verdict}"
            for layer, block, module, error, verdict in self._rows()
        ]
        return "\n".join([*rows, self.summary])

    def __rich__(self) -> Table:
        table = Table(title="Captured gradients against batch-of-one autograd", title_justify="left")
        for column in ("layer", "block", "module", "largest relative error of each head", ""):
            table.add_column(column)
        for row in self._rows():
            table.add_row(*map(escape, row), style="" if row[-1] == "pass" else "bold")
        table.caption, table.caption_justify = escape(self.summary), "left"
        return table

    def _rows(self) -> Iterator[tuple[str, str, str, str, str]]:
        by_projection: dict[Projection, list[CellError]] = {}
        for cell in self.cells:
            by_projection.setdefault(cell.projection, []).append(cell)
        for projection, cells in by_projection.items():
            errors = [cell.error for cell in cells if cell.error is not None]
            verdict = "pass" if all(error <= self.tolerance for error in errors) else "DIFFERS"
            yield (
                f"L{projection.layer}",
                projection.block,
                projection.module_name or "(the model)",
                " ".join(f"{error:.0e}" for error in errors) or "-",
                verdict if errors else "no gradient",
            )


@dataclass(frozen=True, eq=False)
class Comparison:
    """Captured gradients f and those of autograd e, reduced to sums over the weights of each cell.

    Attributes:
        cells: Projection and head.
        difference: Of :math:`(f - e)^2`; NaN where the sample alone has no gradient.
        captured: Of :math:`f^2`.
        expected: Of :math:`e^2`.
        product: Of :math:`f e`.
        undone: What the captured gradient of each sample was multiplied with.
        dtypes: Types of what was captured.
        problems: What the capture itself complains of.
    """

    cells: tuple[tuple[Projection, int], ...]
    difference: Float[Tensor, "sample cell"]
    captured: Float[Tensor, "sample cell"]
    expected: Float[Tensor, "sample cell"]
    product: Float[Tensor, "sample cell"]
    undone: Float[Tensor, sample]
    dtypes: frozenset[torch.dtype]
    problems: tuple[str, ...]

    def verification(self, placed: Sequence[Projection], tolerance: float) -> CaptureVerification:
        """The errors relative to the size of the gradients."""
        size = torch.maximum(self.expected, self.expected.sum(dim=1, keepdim=True) * FLOOR**2)
        errors = torch.where(self.difference == 0, 0.0, (self.difference / size).sqrt()).amax(dim=0)
        known = {(id(p), head): float(error) for (p, head), error in zip(self.cells, errors, strict=True)}
        cells = (CellError(p, head, known.get((id(p), head))) for p in placed for head in range(p.num_heads))
        return CaptureVerification(tuple(cells), tolerance, len(self.expected))

    def factors(self, tolerance: float) -> Float[Tensor, sample] | None:
        """By how much the captured gradient of each sample is too large, if that is all that is wrong."""
        present = self.expected.sum(dim=1) > 0
        captured, expected, product = (
            sums.sum(dim=1)[present] for sums in (self.captured, self.expected, self.product)
        )
        factors = product / expected
        rest = captured - 2 * factors * product + factors.square() * expected
        return factors if bool((rest <= (10 * tolerance) ** 2 * captured).all()) else None


@dataclass(frozen=True, eq=False)
class AutogradComparison:
    """One model, one batch and one way to join samples, to be compared as often as needed.

    Attributes:
        model: Runs as it is.
        batch: On the device of the model.
        loss: Loss of the model on a batch.
        loss_reduction: What the capture is told.
        num_target_tokens_of: Batch key, or function of the batch.
        sample_of: Gives sample n as a batch of one; None to cut the batch.
        projections: Head map.
    """

    model: nn.Module
    batch: Any
    loss: Loss
    loss_reduction: ReductionChoice
    num_target_tokens_of: str | Callable[[Any], Any]
    sample_of: Callable[[Any, int], Any] | None
    projections: Sequence[Projection]

    @property
    def maps(self) -> dict[str, LinearMap]:
        """The projections that train."""
        maps = {p.module_name: find_map(self.model, p) for p in self.projections}
        return {name: one for name, one in maps.items() if one.is_trainable}

    def compare(self) -> Comparison:
        """Capture the batch, and run autograd on one sample after the other.

        Raises:
            ValueError: If no projection trains, the loss is no finite number, or samples cannot be told
                apart.
        """
        if not self.maps:
            raise ValueError("All attention projections are frozen, expected at least one that trains.")
        step, problems = self._capture()
        trained = [p for p in self.projections if p.module_name in self.maps]
        weights = WeightGradients(self.maps)
        rows: list[list[Tensor]] = []
        seen = dict.fromkeys(range(len(trained)), False)
        for n in range(len(step.samples)):
            expected = self._alone(weights, n, len(step.samples))
            row = []
            for index, projection in enumerate(trained):
                theirs = None if expected is None else expected.get(projection.module_name)
                ours = step.factors.get(projection.module_name)
                seen[index] |= ours is not None or theirs is not None
                gradients = None
                if ours is not None:
                    one = select_samples(ours, n, n + 1)
                    gradients = head_gradients(one, projection, step.scales[n : n + 1])[0]
                sums = _sums(gradients, None if theirs is None else _by_head(theirs, projection))
                row.append(
                    (torch.full_like(sums, torch.nan) if expected is None else sums).expand(
                        4, projection.num_heads
                    )
                )
            rows.append(row)
        used = [index for index in seen if seen[index]]
        sums = torch.stack([torch.cat([row[index] for index in used], dim=1) for row in rows], dim=1)
        cells = tuple((trained[index], head) for index in used for head in range(trained[index].num_heads))
        dtypes = {tensor.dtype for f in step.factors.values() for tensor in (f.activation, f.grad_output)}
        difference, captured, wanted, product = sums.unbind()
        return Comparison(
            cells, difference, captured, wanted, product, step.scales, frozenset(dtypes), tuple(problems)
        )

    def run(self, batch: Any) -> Tensor:
        """The loss, with the same random numbers each time.

        Raises:
            ValueError: If it is no finite number with a gradient.
        """
        torch.manual_seed(0)
        value = self.loss(self.model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise ValueError(f"The loss is {value!r}, expected one number that depends on the parameters.")
        if not bool(value.isfinite()):
            raise ValueError(f"The loss is {value.item()}, expected a finite number.")
        return value.sum()

    def joins_samples(self) -> list[str]:
        """Modules that use the statistics of the batch."""
        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
        ]

    def _capture(self) -> tuple[CapturedStep, list[str]]:
        trainable = [p for one in self.maps.values() for p in one.parameters if p.requires_grad]
        with GradientCapture(self.model, self.projections, self.loss_reduction) as capture:
            capture.start()
            loss = self.run(self.batch)
            capture.note_loss(loss)
            torch.autograd.grad(loss, trainable, allow_unused=True)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", CaptureWarning)
                steps = capture.finish(self._labels)
        if not steps:
            raise ValueError(
                "No attention projection delivered a gradient: none takes part in the loss, or all are inside of reentrant "
                "checkpoints, where `torch.autograd.grad` does not reach. Use `use_reentrant=False`, or no checkpoints here."
            )
        if len(steps) != 1:
            raise ValueError(
                f"The loss ran {len(steps)} forward passes with samples of their own that reached an attention projection, "
                "expected one: pass a `loss` that runs one of them, and its part of the batch."
            )
        return steps[0], [str(warning.message) for warning in caught]

    def _labels(self) -> Labels:
        """Tasks play no part here: where the batch names none, all samples have the same.

        Raises:
            ValueError: If samples are packed, and no `sample_of` unpacks them.
        """
        named = isinstance(self.batch, Mapping) and "task" in self.batch
        labels = read_labels(
            self.batch,
            "task" if named else lambda _: "any",
            lambda _: None,
            self.num_target_tokens_of,
        )
        if labels.token_samples is not None and self.sample_of is None:
            raise ValueError(
                "The samples of the batch are packed: pass `sample_of=<function of the batch and n>` that gives sample n as "
                "a batch of one."
            )
        return labels

    def _alone(self, weights: WeightGradients, index: int, num_samples: int) -> dict[str, Tensor] | None:
        """Weight gradients of one sample; None if batch norm refuses a batch of one.

        Raises:
            ValueError: If the model refuses it for another reason.
        """
        single = (
            take_sample(self.batch, index, num_samples)
            if self.sample_of is None
            else self.sample_of(self.batch, index)
        )
        with weights.watching():
            try:
                return weights.of(self.run(single))
            except ValueError:
                if not self.joins_samples():
                    raise
                return None


def _by_head(gradient: Tensor, projection: Projection) -> Tensor:
    """Rows of a weight gradient (columns, for O), a head at a time."""
    gradient = gradient.T if projection.block == "O" else gradient
    return torch.stack([
        gradient[features].flatten() for features in projection.head_features.to(gradient.device)
    ])


def _sums(ours: Tensor | None, theirs: Tensor | None) -> Tensor:
    """Sums over the weights of each head; a gradient that is not there is zero."""
    # A captured gradient may be on the processor already.
    known = [gradient.cpu() for gradient in (ours, theirs) if gradient is not None]
    if not known:
        return torch.zeros(4, 1, dtype=torch.float64)
    a, b = (
        torch.zeros_like(known[0]).double() if one is None else one.cpu().double() for one in (ours, theirs)
    )
    return torch.stack([(a - b).square(), a * a, b * b, a * b]).sum(dim=-1)
