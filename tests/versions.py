"""What older versions of other packages cannot do: each difference has one name here."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])

WHOLE_CHECKPOINT: dict[str, Any] = (
    {"weights_only": False} if "weights_only" in inspect.signature(Trainer.fit).parameters else {}
)
"""For ``Trainer.fit``: read a checkpoint with the states of callbacks. Lightning before 2.6 always does."""

needs_sharding_on_cpu = pytest.mark.skipif(TORCH < (2, 7), reason="torch 2.6 cannot run fully_shard on a CPU")
