"""A weight whose steps lose their part in a subspace of its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qkov_lightning.heads.shapes import ArchitectureError
from qkov_lightning.heads.weights import local_part


@dataclass(frozen=True, eq=False)
class SubspaceRule:
    """Which steps of a weight lose what.

    Attributes:
        outputs: Output features that are protected, by head; None for all of them, as one.
        inputs: Input features that each basis speaks of, by head; None for all of them, with one basis.
        basis: Orthonormal directions, and columns of zeros.
    """

    outputs: Int[Tensor, "head output"] | None
    inputs: Int[Tensor, "head input"] | None
    basis: Float[Tensor, "part own direction"]


@dataclass(frozen=True, eq=False)
class _OwnRows:
    """Protected rows that this process holds, and the head that each belongs to."""

    rows: Int[Tensor, row]
    heads: Int[Tensor, row]


class ProjectedWeight:
    r"""A weight whose steps are projected: :math:`\Delta W \leftarrow \Delta W (I - U U^\top)`.

    Args:
        name: Name of the parameter, for messages.
        parameter: The weight, or its sharded form.
        input_axis: Axis of its inputs.
        rules: What is taken out; they speak of different rows, or of different columns.

    Raises:
        ArchitectureError: If this process holds only some of the inputs.

    Attributes:
        taken: Squared size of what was taken out of the steps, and of the steps, by rule.
    """

    def __init__(
        self, name: str, parameter: nn.Parameter, input_axis: int, rules: list[SubspaceRule]
    ) -> None:
        part, _ = local_part(parameter, input_axis)
        if part.shape[input_axis] != parameter.shape[input_axis]:
            raise ArchitectureError(
                f"`{name}` is shared out along its inputs (axis {input_axis}), expected whole rows in each process: a step's "
                "part in the subspace needs all inputs. Leave this module out of `fully_shard`, or replicate it."
            )
        self.parameter, self.input_axis = parameter, input_axis
        self._rules = [self._placed(rule, part.device) for rule in rules]
        self._own_rows = [self._held(rule, part) for rule in self._rules]
        self._before: Tensor | None = None
        self.taken = [
            torch.zeros(2, len(rule.basis if rule.outputs is None else rule.outputs), device=part.device)
            for rule in self._rules
        ]

    def _placed(self, rule: SubspaceRule, device: torch.device) -> SubspaceRule:
        def to(indices: Tensor | None) -> Tensor | None:
            return None if indices is None else indices.to(device)

        return SubspaceRule(to(rule.outputs), to(rule.inputs), rule.basis.to(device))

    def _held(self, rule: SubspaceRule, part: Tensor) -> _OwnRows | None:
        """Found once: which rows there are is a question that an accelerator would be waited for."""
        if rule.outputs is None:
            return None
        _, first = local_part(self.parameter.detach(), 1 - self.input_axis)
        here = (rule.outputs >= first) & (rule.outputs < first + part.shape[1 - self.input_axis])
        return _OwnRows(rule.outputs[here] - first, here.nonzero()[:, 0])

    def remember(self) -> None:
        """Note the weight before a step, if it is not noted."""
        if self._before is None:
            self._before = self._part().clone()

    @torch.no_grad()
    def project(self) -> None:
        """Take out what the weight has moved in the subspace since it was noted, and forget the note."""
        if self._before is None:
            return
        part = self._part()
        moved = (part - self._before).float()
        step = moved.clone()
        for rule, own_rows, taken in zip(self._rules, self._own_rows, self.taken, strict=True):
            self._take(rule, own_rows, step, taken)
        # What is not projected stays as it is to the last bit.
        part.copy_(torch.where(step == moved, part, self._before + step.to(part.dtype)))
        self._before = None

    def _part(self) -> Float[Tensor, "output input"]:
        part, _ = local_part(self.parameter.detach(), self.input_axis)
        return part if self.input_axis == 1 else part.T

    def _take(
        self,
        rule: SubspaceRule,
        own_rows: _OwnRows | None,
        step: Float[Tensor, "output input"],
        taken: Float[Tensor, "2 head"],
    ) -> None:
        """Write the projected step over the step."""
        if rule.inputs is not None:  # an output projection: a basis for each head's columns
            own = step[:, rule.inputs.flatten()].unflatten(1, rule.inputs.shape).transpose(0, 1)
            inside = own @ rule.basis @ rule.basis.transpose(1, 2)
            step[:, rule.inputs.flatten()] = (own - inside).transpose(0, 1).flatten(1)
            taken += torch.stack([inside.square().sum(dim=(1, 2)), own.square().sum(dim=(1, 2))])
            return
        basis = rule.basis[0]
        if own_rows is None:
            inside = step @ basis @ basis.T
            taken += torch.stack([inside.square().sum(), step.square().sum()])[:, None]
            step -= inside
            return
        own = step[own_rows.rows]
        inside = own @ basis @ basis.T
        step[own_rows.rows] = own - inside
        taken.index_add_(
            1, own_rows.heads, torch.stack([inside.square().sum(dim=1), own.square().sum(dim=1)])
        )
