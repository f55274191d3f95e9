"""The strategies of Lightning under which a tap sees whole projections."""

from __future__ import annotations

from lightning.pytorch import Trainer


def check_strategy(trainer: Trainer, probing: bool) -> None:
    """Refuse the strategies that split a projection, or scale the loss, where no tap sees it.

    Args:
        trainer: Has the strategy.
        probing: Whether a probe runs outside of the training step.

    Raises:
        ValueError: If it is one of them.
    """
    # By name: Lightning has two packages, with a class each.
    for name in (cls.__name__ for cls in type(trainer.strategy).__mro__):
        if name in {"FSDPStrategy", "DeepSpeedStrategy"}:
            raise ValueError(
                f"InterferenceMonitor is not tested under {name}, and its numbers could be wrong. It supports one device, DDPStrategy and "
                "ModelParallelStrategy (FSDP2: `fully_shard` in `configure_model`). Use one of these."
            )
        if name == "ModelParallelStrategy":
            if probing:
                raise ValueError(
                    "InterferenceMonitor cannot run its probe under ModelParallelStrategy: outside of the training step the weights "
                    "are in pieces. Leave `probe` out, or measure a checkpoint with `qkov probe`."
                )
            size = trainer.strategy.device_mesh["tensor_parallel"].size()  # type: ignore[attr-defined]
            if size > 1:
                raise ValueError(
                    f"InterferenceMonitor cannot see whole heads under ModelParallelStrategy with tensor_parallel_size={size}: each "
                    "process computes a part of every projection. Say tensor_parallel_size=1 and shard with `fully_shard`."
                )
