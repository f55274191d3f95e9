"""Sampled storage: unbiased, honest about its error, the same weights everywhere, and small."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from models import Classifier, GroupedAttention
from modules import ADVICE, Module, loader, trainer
from modules import Samples as ModuleSamples
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from versions import WHOLE_CHECKPOINT

from qkov_lightning import (
    GradientCache,
    HeadInterference,
    InterferenceMonitor,
    Projection,
    contiguous_heads,
    head_interference,
)
from qkov_lightning.capture.factors import CapturedStep, GradientFactors
from qkov_lightning.capture.gradients import head_gradients, owned_part
from qkov_lightning.capture.samples import Samples
from qkov_lightning.store.sampling import Coordinates, draw_slice, sampled_gradients

pytestmark = pytest.mark.filterwarnings(*ADVICE)

HEADS, HEAD_DIM, OTHER = 2, 6, 20
TASKS = ["math", "code"] * 4


def gradients() -> torch.Tensor:
    """Of eight samples, with large and small features on both sides, in float64."""
    generator = torch.Generator().manual_seed(1)
    own = torch.rand(HEADS, HEAD_DIM, 1, generator=generator).square()
    other = torch.rand(OTHER, generator=generator).square()
    noise = torch.randn(len(TASKS), HEADS, HEAD_DIM, OTHER, generator=generator, dtype=torch.float64)
    return (own * other * noise).flatten(2)


def sizes(exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    squares = exact.square().mean(dim=0).unflatten(-1, (HEAD_DIM, OTHER))
    return squares.sum(dim=-1).sqrt(), squares.sum(dim=(0, 1)).sqrt()


def scored(exact: torch.Tensor, count: int, replicates: int, seed: int) -> dict[str, torch.Tensor]:
    """Scores of math and code from drawn weights only."""
    fisher = exact.square().mean(dim=0)
    drawn = draw_slice(*sizes(exact), torch.Generator().manual_seed(seed), count, replicates)
    flat = (drawn.own * OTHER + drawn.other).flatten(1)
    metric = HeadInterference(["code", "math"], 1, HEADS)
    kept = exact.gather(2, flat.expand(len(exact), -1, -1))
    metric.update(kept, TASKS, fisher.gather(1, flat), layer=0, block="Q", weights=drawn.weight)
    return {name: value[1, 0, 0, :, 0] for name, value in metric.compute().items() if value.ndim == 5}


def test_every_sum_over_weights_is_unbiased_over_the_draws() -> None:
    field = gradients().square().mean(dim=0)
    draws = []
    for seed in range(2000):
        drawn = draw_slice(*sizes(gradients()), torch.Generator().manual_seed(seed), 16, 4)
        flat = (drawn.own * OTHER + drawn.other).flatten(1)
        draws.append((field.gather(1, flat) * drawn.weight.flatten(1).double()).sum(dim=1))
    estimates = torch.stack(draws)
    error = estimates.std(dim=0) / len(draws) ** 0.5
    assert (error < 0.05 * field.sum(dim=1)).all()
    assert ((estimates.mean(dim=0) - field.sum(dim=1)).abs() < 4 * error).all()


def test_scores_from_drawn_weights_are_right_on_average_and_their_errors_cover_the_truth() -> None:
    """The reported sampling error is compared with the spread over 150 draws of the same gradients."""
    exact = gradients()
    truth = head_interference(exact, TASKS, exact.square().mean(dim=0))["math", "code"]
    draws = [scored(exact, 32, 8, seed) for seed in range(150)]
    for score in ("interference", "relative"):
        values = torch.stack([draw[score] for draw in draws])
        spread = values.std(dim=0)
        # Ratios have a bias of the order of their variance; four Monte-Carlo errors beside it.
        tolerance = 4 * spread / len(draws) ** 0.5 + 2 * spread**2 / truth[score]
        assert ((values.mean(dim=0) - truth[score]).abs() < tolerance).all()
        variances = torch.stack([draw[f"{score}_standard_error"] for draw in draws]).square().mean(dim=0)
        sampling = (variances - truth[f"{score}_standard_error"].square()).clamp(min=0).sqrt()
        assert (sampling > 0.7 * spread).all()
        assert (sampling < 1.6 * spread).all()


def test_where_every_weight_is_drawn_nothing_changes() -> None:
    exact = gradients()
    truth = head_interference(exact, TASKS, exact.square().mean(dim=0))["math", "code"]
    for name, value in scored(exact, HEAD_DIM * OTHER, 8, seed=0).items():
        torch.testing.assert_close(value, truth[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", ["Q", "O"])
def test_sampled_gradients_are_the_gradients_at_the_drawn_weights(block: Any) -> None:
    projection = Projection("m", 0, "m", block, contiguous_heads(3, 8))
    offsets = torch.tensor([0, 4, 4, 9])  # one sample has no token
    factors = GradientFactors(torch.randn(9, 24), torch.randn(9, 24), offsets)
    drawn = draw_slice(torch.rand(3, 8), torch.rand(24), torch.Generator().manual_seed(0), 64, 4)
    part = owned_part(factors, projection, torch.ones(3, dtype=torch.float64))
    dense = head_gradients(factors, projection, torch.ones(3, dtype=torch.float64))
    flat = (drawn.own * 24 + drawn.other).flatten(1)
    # Float32 sums over tokens in another order.
    torch.testing.assert_close(
        sampled_gradients(part, drawn), dense.gather(2, flat.expand(3, -1, -1)), rtol=1e-5, atol=1e-5
    )


def captured_like_qwen3(num_samples: int = 8, tokens: int = 4) -> tuple[CapturedStep, list[Projection]]:
    """One attention layer of Qwen3-1.7B: 16 query heads, 8 key and value heads."""
    widths = {"q": 2048, "k": 1024, "v": 1024, "o": 2048}
    shared, count = torch.randn(num_samples * tokens, 2048), num_samples * tokens
    offsets = torch.arange(0, count + 1, tokens)
    factors = {name: GradientFactors(shared, torch.randn(count, widths[name]), offsets) for name in widths}
    heads = {name: contiguous_heads(8 if name in "kv" else 16, 128) for name in widths}
    projections = [Projection(name, 0, "layer", name.upper(), heads[name]) for name in widths]  # type: ignore[arg-type]
    samples = Samples(("math",) * num_samples, tuple(map(str, range(num_samples))))
    return CapturedStep(samples, *torch.ones(2, num_samples).double(), factors), projections


def test_a_sample_of_the_qwen3_1_7b_shape_takes_2_75_megabytes(tmp_path: Path) -> None:
    step, projections = captured_like_qwen3()
    coordinates = Coordinates.draw([step], projections)
    cache = GradientCache(tmp_path)
    cache.append(0, [coordinates.sample(step, projections)])
    ((record, _),) = cache.records()
    header = 4096  # of each file: names, checksums, identifiers
    assert 28 * (record.num_bytes - header) / 8 <= 2.7526e6
    assert record.fingerprint == coordinates.fingerprint


def test_the_same_seed_and_step_draw_the_same_weights_and_a_file_brings_them_back(tmp_path: Path) -> None:
    step, projections = captured_like_qwen3(2)
    first, second = (Coordinates.draw([step], projections) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != Coordinates.draw([step], projections, seed=1).fingerprint
    tensors, metadata = first.to_file()
    save_file(tensors, tmp_path / "file", metadata)
    assert Coordinates.load(tmp_path / "file").fingerprint == first.fingerprint
    (tmp_path / "bad").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="bad holds no coordinates"):
        Coordinates.load(tmp_path / "bad")


class Wide(Module):
    """Heads of 16 x 64 weights: more than are kept."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        attention = GroupedAttention(width=64, heads=2, kv_heads=1, size=16, value_size=16)
        super().__init__(learning_rate=0.0, network=Classifier([attention], width=64))


class LongSamples(ModuleSamples):
    """So many tokens that exact gradients take more than 512 weights of each head."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.tokens = torch.randint(0, 11, (size, 64), generator=torch.Generator().manual_seed(7))


def monitor(storage: Any = "sampled", **kwargs: Any) -> InterferenceMonitor:
    return InterferenceMonitor(every_n_steps=1, storage=storage, num_hot_cells=1, **kwargs)


def test_a_model_whose_heads_are_small_is_kept_whole(tmp_path: Path) -> None:
    sampled, exact = monitor(), monitor("factors")
    trainer(tmp_path / "a", sampled).fit(Module(learning_rate=0.0), loader(24))
    trainer(tmp_path / "b", exact).fit(Module(learning_rate=0.0), loader(24))
    assert sampled.heatmap.notes["storage"] == "sampled"
    for score, values in exact.heatmap.scores.items():
        # Float32 sums in another order, more after cancellation.
        torch.testing.assert_close(
            sampled.heatmap.scores[score], values, rtol=1e-3, atol=2e-5, equal_nan=True
        )
    # A pair and its mirror image hurt alike under SGD: their order is a matter of rounding.
    assert {str(pair) for pair in sampled.heatmap.pairs} == {str(pair) for pair in exact.heatmap.pairs}


def test_a_run_keeps_512_weights_of_each_head_and_stays_near_the_exact_numbers(tmp_path: Path) -> None:
    sampled, exact = monitor(), monitor("factors")
    trainer(tmp_path / "a", sampled).fit(Wide(), loader(24))
    trainer(tmp_path / "b", exact).fit(Wide(), loader(24))
    notes = sampled.heatmap.notes["sampling"]
    assert (notes["coordinates_per_head"], notes["replicates"]) == (512, 8)
    assert json.loads(sampled.heatmap.to_json())["notes"]["storage"] == "sampled"
    found, truth = (one.heatmap.values("math", "code", "relative") for one in (sampled, exact))
    errors = sampled.heatmap.errors("math", "code", "relative")
    known = ~truth.isnan()
    assert torch.equal(found.isnan(), truth.isnan())
    assert ((found - truth).abs() < 3 * errors)[known].all()
    assert not torch.equal(found[known], truth[known])
    assert len(sampled.heatmap.pairs) == len(exact.heatmap.pairs)


def test_auto_takes_sampled_storage_where_exact_gradients_would_not_fit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A sample takes 25 kB exactly (6,144 weights), 12 kB sampled (6 heads); half of the budget holds 24."""
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        for budget, expected in ((1.0, "factors"), (3e-4, "sampled")):
            auto = monitor("auto", max_cache_gb=budget, max_samples_per_task=12)
            trainer(tmp_path / expected, auto).fit(Wide(), DataLoader(LongSamples(24), batch_size=4))
            assert auto.heatmap.notes["storage"] == expected
    said = [record.message for record in caplog.records if "InterferenceMonitor:" in record.message]
    said = [line for line in said if "storage" in line]
    assert ["exact storage" in said[0], "sampled storage" in said[1], len(said)] == [True, True, 2]


def resumable(root: Path, callback: InterferenceMonitor, epochs: int) -> Any:
    keep = ModelCheckpoint(root / "checkpoints", filename="{epoch}", save_top_k=-1)
    return trainer(root, callback, keep, max_epochs=epochs, enable_checkpointing=True)


def test_a_resumed_run_keeps_the_weights_that_were_drawn(tmp_path: Path) -> None:
    def data() -> tuple[Any, Any]:
        return loader(24, ids=False), loader(4)

    straight, resumed = monitor(), monitor("auto")
    resumable(tmp_path / "straight", straight, 2).fit(Wide(), *data())
    resumable(tmp_path / "stopped", monitor(), 1).fit(Wide(), *data())
    last = tmp_path / "stopped" / "checkpoints" / "epoch=0.ckpt"
    resumable(tmp_path / "resumed", resumed, 2).fit(Wide(), *data(), ckpt_path=last, **WHOLE_CHECKPOINT)
    assert resumed.heatmap.to_json() == straight.heatmap.to_json()
    with pytest.raises(ValueError, match="storage is 'factors', but the checkpoint's run stores 'sampled'"):
        resumable(tmp_path / "other", monitor("factors"), 2).fit(
            Wide(), *data(), ckpt_path=last, **WHOLE_CHECKPOINT
        )


def test_a_cache_of_other_weights_is_refused(tmp_path: Path) -> None:
    sampled = monitor(cache_dir=tmp_path / "cache", keep_cache=True)
    fit = trainer(tmp_path, sampled, limit_train_batches=3)
    fit.fit(Wide(), loader(24))
    step, _ = captured_like_qwen3(2)
    GradientCache(next((tmp_path / "cache").iterdir())).append(99, [step])
    fit.fit_loop.max_epochs = 2
    with pytest.warns(UserWarning, match="holds exact factors, expected gradients at the sampled weights"):
        fit.fit(Wide(), loader(24))


def test_a_probe_is_never_sampled() -> None:
    with pytest.raises(
        ValueError, match="storage is 'sampled', expected auto or exact: a probe measures exact"
    ):
        InterferenceMonitor(storage="sampled", probe=[{}])
