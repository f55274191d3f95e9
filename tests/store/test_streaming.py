"""The cache is read once per pass, in bounded memory, and what is damaged is left out."""

from __future__ import annotations

import threading
import weakref
import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qkov_lightning import CacheError, GradientCache, Projection, contiguous_heads
from qkov_lightning.capture.factors import CapturedStep, GradientFactors
from qkov_lightning.capture.gradients import head_gradients
from qkov_lightning.capture.samples import Samples
from qkov_lightning.measure import pairs as pairs_stage
from qkov_lightning.measure.measurement import measure_interference
from qkov_lightning.scores import spans
from qkov_lightning.scores.settings import ScoreSettings
from qkov_lightning.store import streaming as streaming_stage
from qkov_lightning.store.stored import StoredGradients
from qkov_lightning.store.streaming import CacheReader, ahead, head_gradients_of

WIDTH, HEADS, TOKENS = 48, 4, 6
PROJECTIONS = [
    Projection("qkv", 0, "attention", block, contiguous_heads(HEADS, WIDTH // HEADS, start=WIDTH * index))
    for index, block in enumerate("QKV")
] + [Projection("out", 0, "attention", "O", contiguous_heads(HEADS, WIDTH // HEADS))]


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)


def filled(directory: Path, num_steps: int, dtype: torch.dtype = torch.float32) -> GradientCache:
    """Four samples of two tasks a step, of uneven length."""
    cache = GradientCache(directory, max_samples_per_task=10**6)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([TOKENS, TOKENS - 1, TOKENS, TOKENS - 3])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    for step in range(num_steps):
        factors = {
            name: GradientFactors(
                torch.randn(int(offsets[-1]), WIDTH, generator=generator).to(dtype),
                torch.randn(int(offsets[-1]), width, generator=generator).to(dtype),
                offsets,
            )
            for name, width in (("qkv", 3 * WIDTH), ("out", WIDTH))
        }
        ids = tuple(f"{step}.{i}" for i in range(4))
        samples = Samples(("math", "code", "math", "code"), ids)
        scales = torch.rand(4, generator=generator).double()
        cache.append(step, [CapturedStep(samples, scales, torch.ones(4).double(), factors)])
    return cache


def records_of(cache: GradientCache) -> list:
    return [record for record, _ in cache.records()]


@pytest.mark.parametrize(
    "held_bytes",
    [1, 20_000, 100_000, 2**28],
    ids=["feature by feature", "pieces of a head", "head by head", "all held"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_gradients_are_those_of_the_records_whatever_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_bytes: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(streaming_stage, "HELD_BYTES", held_bytes)
    monkeypatch.setattr(streaming_stage, "SUMMED_BYTES", 5000)
    records = records_of(filled(tmp_path, 5, dtype))
    reader = CacheReader(records)
    for projection in PROJECTIONS:
        expected = torch.cat([
            head_gradients(record.read(projection.module_name), projection, record.scales)
            for record in records
        ])
        seen = []
        for gradients in head_gradients_of(reader, projection):
            for _ in range(2):
                blocks = list(gradients)
                assert all(block.nbytes <= max(held_bytes, 20 * 4 * WIDTH) for block in blocks)
                streamed = torch.cat(blocks, dim=2)
                # Float32 sums over tokens, in batches of another shape.
                torch.testing.assert_close(streamed, expected[:, gradients.heads], rtol=1e-5, atol=1e-5)
            assert gradients.tasks == ["math", "code"] * 10
            assert gradients.steps == [step for step in range(5) for _ in range(4)]
            seen += range(gradients.heads.start, gradients.heads.stop)
        assert seen == list(range(HEADS))


def test_every_tensor_is_verified_once_per_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = filled(tmp_path / "cache", 3)
    counted = []
    real = zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda data: counted.append(1) or real(data))
    measure_interference(StoredGradients(cache, tmp_path / "fisher"), PROJECTIONS, Attention())
    tensors = {(record.path, key) for record in records_of(cache) for key in record.checksums}
    assert len(counted) == len(tensors)


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made by operations took at one time, views not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.owners: Counter[int] = Counter()
        self.live = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                weakref.finalize(tensor, self.released, storage.data_ptr(), storage.nbytes())
                self.live += storage.nbytes() * (self.owners[storage.data_ptr()] == 0)
                self.owners[storage.data_ptr()] += 1
        self.peak = max(self.peak, self.live)
        return result

    def released(self, pointer: int, num_bytes: int) -> None:
        self.owners[pointer] -= 1
        self.live -= num_bytes * (self.owners[pointer] == 0)


def peak_bytes(directory: Path, num_steps: int) -> int:
    cache = filled(directory / "cache", num_steps)
    with LiveBytes() as live:
        stored = StoredGradients(cache, directory / "fisher")
        measure_interference(stored, PROJECTIONS[2:], Attention(), ScoreSettings(num_hot_cells=1))
    return live.peak


def test_memory_stays_under_the_stated_cap_whatever_the_number_of_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = 200_000
    for stage in (streaming_stage, pairs_stage):
        monkeypatch.setattr(stage, "HELD_BYTES", held)
    monkeypatch.setattr(spans, "SPAN_BYTES", 20_000)
    monkeypatch.setattr(spans, "MIN_WEIGHTS", 16)
    weights, tasks = WIDTH * WIDTH * 4, 2
    # Of one projection: the previous Fisher, the new one in parts and joined, and each task's three means.
    fisher = 6 * tasks * weights
    # What is worked on at once: gradients, squares, magnitudes, what each sample changes of the inverse
    # Fisher, and the factors of two records.
    worked_on = 14 * 20_000
    few, many = peak_bytes(tmp_path / "few", 10), peak_bytes(tmp_path / "many", 40)
    gradients_of_one_projection = 160 * weights
    assert gradients_of_one_projection > 5 * held, "or the test would show nothing"
    assert max(few, many) < held + fisher + worked_on
    # What is left are numbers per sample and cell: 160 samples x 16 statistics of 4 heads in float64.
    assert many - few < 160 * 16 * 4 * 8


def test_reading_ahead_keeps_the_order_and_leaves_no_thread() -> None:
    assert list(ahead(range(5))) == [0, 1, 2, 3, 4]
    iterator = ahead(iter(range(5)))
    assert next(iterator) == 0
    iterator.close()
    with pytest.raises(ZeroDivisionError):
        list(ahead(1 / number for number in (1, 0)))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("qkov-read")]


def test_a_record_that_is_damaged_between_two_passes_ends_the_measurement(tmp_path: Path) -> None:
    records = records_of(filled(tmp_path, 2))
    reader = CacheReader(records)
    list(reader.parts(PROJECTIONS[0]))
    records[0].path.unlink()
    with pytest.raises(CacheError, match="cannot be read"):
        list(reader.parts(PROJECTIONS[1]))
