"""Bytes on disk for a sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from caches import STORAGES, bytes_per_sample, written_cache
from safetensors.torch import save_file
from shapes import batch_of, loss_of, qwen3

from qkov_lightning import GradientCache, GradientCapture, find_projections, task
from qkov_lightning.capture.gradients import dense_gradients


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def bench_factors_against_whole_gradients(
    precision: str, benchmark: Callable, report: Callable, tmp_path: Path
) -> None:
    """One attention layer in the shape of Qwen3-1.7B, 2 samples of 128 tokens, in the model's precision."""
    model = qwen3(num_layers=1, hidden=2048, intermediate=64).to(getattr(torch, precision))
    batch = batch_of(2)
    with GradientCapture(model, find_projections(model)) as capture:
        capture.start()
        with task(batch["task"]):
            loss_of(model, batch["tokens"]).backward()
        (step,) = capture.finish()
    cache = GradientCache(tmp_path / "factors")
    benchmark.pedantic(cache.append, (0, [step]), rounds=1)
    whole = {
        name: dense_gradients(factors).gradient.to(factors.activation.dtype).contiguous()
        for name, factors in step.factors.items()
    }
    save_file(whole, tmp_path / "whole.safetensors")
    dense = (tmp_path / "whole.safetensors").stat().st_size / 2
    report(
        f"Qwen3-1.7B, 128 tokens, {precision}: bytes of factors / whole gradients ({dense / 1e6:.1f} MB a sample and layer)",
        f"1/{dense / bytes_per_sample(cache):.1f}",
        "1/8",
    )


@pytest.mark.parametrize("storage", STORAGES)
def bench_bytes_of_a_sample(storage: str, benchmark: Callable, report: Callable, tmp_path: Path) -> None:
    """Two layers of Qwen3-0.6B, times 14: every layer takes the same.

    A step of 16 samples shares one header.
    """
    cache = benchmark.pedantic(
        written_cache, (qwen3(num_layers=2), [batch_of(16)], tmp_path, storage), rounds=1
    )
    report(
        f"28 layers x 16 heads of Qwen3-0.6B, 128 tokens, float32, {storage}: MB a sample",
        f"{bytes_per_sample(cache) * 14 / 1e6:.2f}",
        "2.75" if storage == "sampled" else "",
    )
