"""The head map of a training, proven on the first sample of its first batch, outside of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from qkov_lightning.capture.rehearsal import forward_pass, rehearsing
from qkov_lightning.capture.single_sample import take_sample
from qkov_lightning.heads.architectures import named_projections
from qkov_lightning.heads.projections import Projection
from qkov_lightning.heads.proof import prove_projections
from qkov_lightning.heads.shapes import ArchitectureError

Verify = Literal["first_batch", "off"]
"""When the head map of a training is proven."""

VERIFY = ("first_batch", "off")
"""The values of ``Verify``."""


class _RunError(RuntimeError):
    """The model does not run on one sample."""


def place_heads(
    trainer: Trainer,
    module: LightningModule,
    batch: Any,
    projections: Sequence[Projection] | None,
    verify: Verify,
) -> list[Projection]:
    """The head map of a training.

    Costs one forward pass of one sample, in evaluation mode, and about as much again for the derivatives.
    Nothing of the run is touched.

    Args:
        trainer: Runs the training.
        module: Its module.
        batch: The first batch, on the device.
        projections: The map, if it is given.
        verify: Whether to prove it.

    Returns:
        The map, each layer with how it was placed.

    Raises:
        ArchitectureError: If the heads cannot be placed, or are not where they are said to be.
    """
    if verify == "off":
        return list(projections or named_projections(module))

    def run(sample: Any) -> object:
        return forward_pass(module, sample)

    with trainer.precision_plugin.train_step_context(), rehearsing(module, evaluation=True):
        return proven_projections(module, run, batch, projections)


def proven_projections(
    model: nn.Module, run: Callable[[Any], object], batch: Any, projections: Sequence[Projection] | None
) -> list[Projection]:
    """The head map of a model, proven on the first sample of a batch.

    Args:
        model: Left as found.
        run: Runs it on a batch.
        batch: The batch.
        projections: The map, if it is given.

    Returns:
        The map, each layer with how it was placed: by name where the model does not run on one sample.

    Raises:
        ArchitectureError: If the heads cannot be placed, or are not where they are said to be.
    """
    sample = first_sample(batch)

    def run_sample() -> object:
        try:
            loss = run(sample)
            for part in model.modules():  # under FSDP 2 only a backward pass would
                if isinstance(part, FSDPModule):
                    part.reshard()
            return loss
        except Exception as error:
            raise _RunError(f"{type(error).__name__}: {error}") from error

    try:
        return prove_projections(model, run_sample, projections)
    except _RunError as error:
        try:
            named = list(projections or named_projections(model))
        except ArchitectureError as unnamed:
            raise ArchitectureError(
                f"{unnamed} The heads could not be found from derivatives either: the model does not run on one sample of the "
                f"batch ({error})."
            ) from error
        reason = f"by name, not provable: the model does not run on one sample of the batch ({error})"
        return [replace(projection, placed=reason) for projection in named]


def first_sample(batch: Any) -> Any:
    """The first sample of a batch, as a batch of one; all of a batch whose samples are packed."""
    tensors = list(_tensors(batch))
    if not tensors or (isinstance(batch, Mapping) and batch.get("token_samples") is not None):
        return batch
    return take_sample(batch, 0, len(tensors[0]))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.ndim else []
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
