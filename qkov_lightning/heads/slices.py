"""Rows or columns of a parameter that keep their values while the rest of it trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qkov_lightning.heads.weights import local_part


@dataclass(eq=False)
class FrozenSlice:
    """Rows or columns of one parameter, or of this process's part of it.

    Attributes:
        parameter: The parameter.
        axis: Axis that the features are counted along.
        features: Indices along it.
    """

    parameter: nn.Parameter
    axis: int
    features: list[int]
    _indices: Tensor | None = None
    _before: Tensor | None = None

    def _part(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        part, start = local_part(tensor, self.axis)
        if self._indices is None:
            own = [i - start for i in self.features if start <= i < start + part.shape[self.axis]]
            self._indices = torch.tensor(own, dtype=torch.int64, device=part.device)
        return part, self._indices

    @torch.no_grad()
    def remove_gradient(self) -> None:
        """Set the gradient of the slice to zero."""
        if self.parameter.grad is not None:
            part, indices = self._part(self.parameter.grad)
            part.index_fill_(self.axis, indices, 0.0)

    @torch.no_grad()
    def remember(self) -> None:
        """Note the values of the slice, if none are noted."""
        if self._before is None:
            part, indices = self._part(self.parameter)
            self._before = part.index_select(self.axis, indices)

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the slice the noted values."""
        if self._before is not None:
            part, indices = self._part(self.parameter)
            part.index_copy_(self.axis, indices, self._before)

    def forget(self) -> None:
        """Note nothing."""
        self._before = None
