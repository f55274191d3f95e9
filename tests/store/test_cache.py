"""The cache: nothing lost, the newest kept, garbage refused."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qkov_lightning import CacheError, GradientCache
from qkov_lightning.capture.factors import CapturedStep, GradientFactors
from qkov_lightning.capture.gradients import DenseGradients, dense_gradients
from qkov_lightning.capture.samples import Samples


def captured(ids: list[str], tasks: list[str] | None = None, tokens: int = 2, width: int = 8) -> CapturedStep:
    """A step with two modules that share an input and one with an input of its own."""
    offsets = torch.arange(0, len(ids) * tokens + 1, tokens)
    shared = torch.randn(len(ids) * tokens, width)
    other = torch.randn(len(ids) * tokens, width).to(torch.bfloat16)
    grads = [torch.randn(len(ids) * tokens, width) for _ in range(2)]
    return CapturedStep(
        Samples(tuple(tasks or ["math"] * len(ids)), tuple(ids)),
        torch.full((len(ids),), 4.0, dtype=torch.float64),
        torch.arange(1.0, len(ids) + 1, dtype=torch.float64),
        {
            "q": GradientFactors(shared, grads[0], offsets),
            "k": GradientFactors(shared, grads[1], offsets),
            "o": GradientFactors(other, other.flip(0), offsets),
        },
    )


def ids_in(cache: GradientCache) -> list[str]:
    return [
        record.samples.ids[i] for record, mask in cache.records() for i in mask.nonzero().flatten().tolist()
    ]


def test_what_is_read_is_what_was_captured(tmp_path: Path) -> None:
    cache, step = GradientCache(tmp_path), captured(["a", "b"], ["math", "code"])
    cache.append(7, [step])
    ((record, mask),) = GradientCache(tmp_path).records()
    assert (record.step, record.samples, mask.tolist()) == (7, step.samples, [True, True])
    assert torch.equal(record.scales, step.scales)
    for name, factors in step.factors.items():
        read = record.read(name)
        assert isinstance(read, GradientFactors)
        assert torch.equal(read.activation, factors.activation)
        assert torch.equal(read.grad_output, factors.grad_output)
        assert torch.equal(read.offsets, factors.offsets)


def test_a_shared_input_is_stored_once(tmp_path: Path) -> None:
    cache = GradientCache(tmp_path)
    cache.append(0, [captured(["a", "b"])])
    (path,) = tmp_path.glob("*.safetensors")
    assert sorted(load_file(path)) == [
        "activation/0", "activation/1", "grad_output/k", "grad_output/o", "grad_output/q", "offsets/0", "offsets/1",
    ]  # fmt: skip


def test_dense_gradients_are_stored_where_they_are_smaller(tmp_path: Path) -> None:
    cache, step = GradientCache(tmp_path), captured(["a", "b"], tokens=64)
    cache.append(0, [step])
    ((record, _),) = cache.records()
    dense = record.read("q")
    assert isinstance(dense, DenseGradients)
    assert torch.equal(dense.gradient, dense_gradients(step.factors["q"]).gradient)
    assert record.num_bytes < sum(f.activation.nbytes + f.grad_output.nbytes for f in step.factors.values())


def test_the_newest_samples_of_each_task_stay(tmp_path: Path) -> None:
    cache = GradientCache(tmp_path, max_samples_per_task=3)
    cache.append(0, [captured(["m0", "c0"], ["math", "code"])])
    cache.append(1, [captured(["m1", "m2"])])
    cache.append(2, [captured(["m3", "m4"])])
    assert ids_in(cache) == ["c0", "m2", "m3", "m4"]
    assert len(list(tmp_path.glob("*.safetensors"))) == 3, "a file stays while one of its samples is needed"
    cache.append(3, [captured(["c1", "c2", "c3"], ["code"] * 3)])
    assert ids_in(cache) == ["m2", "m3", "m4", "c1", "c2", "c3"]
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_a_sample_that_is_captured_again_counts_once(tmp_path: Path) -> None:
    cache = GradientCache(tmp_path)
    cache.append(0, [captured(["a", "b"])])
    cache.append(1, [captured(["b", "c"])])
    assert ids_in(cache) == ["a", "b", "c"]
    (_, old), (_, new) = cache.records()
    assert (old.tolist(), new.tolist()) == ([True, False], [True, True])


def test_the_byte_budget_keeps_the_newest_and_is_kept(tmp_path: Path) -> None:
    probe = GradientCache(tmp_path / "probe")
    probe.append(0, [captured(["x"])])
    size = probe.records()[0][0].num_bytes
    cache = GradientCache(tmp_path / "cache", max_bytes=2 * 3 * size + size)
    for step in range(6):
        cache.append(step, [captured([f"s{step}"])])
    assert ids_in(cache) == ["s3", "s4", "s5"]
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 7 * size


def test_a_step_larger_than_the_budget_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"One captured step takes .* GB, more than .* Raise max_cache_gb"):
        GradientCache(tmp_path, max_bytes=100).append(0, [captured(["a"])])


def test_what_the_last_two_checkpoints_need_is_not_evicted(tmp_path: Path) -> None:
    cache = GradientCache(tmp_path, max_samples_per_task=2)
    for step in range(3):
        cache.append(step, [captured([f"s{step}"])])
    cache.note_checkpoint(3)
    for step in range(3, 8):
        cache.append(step, [captured([f"s{step}"])])
    assert ids_in(cache) == ["s6", "s7"]
    restarted = GradientCache(tmp_path, max_samples_per_task=2)
    restarted.restart_at(3)
    assert ids_in(restarted) == ["s1", "s2"], "as it was when the checkpoint was written"


def test_a_run_adopts_the_records_of_an_earlier_one_up_to_the_checkpoint(tmp_path: Path) -> None:
    first = GradientCache(tmp_path / "first")
    for step in range(4):
        first.append(step, [captured([f"s{step}"])])
    second = GradientCache(tmp_path / "second")
    second.adopt(tmp_path / "first", before=2)
    assert ids_in(second) == ["s0", "s1"]
    assert ids_in(first) == ["s0", "s1", "s2", "s3"], "the earlier run keeps its own"


def test_records_of_all_processes_are_read_in_order_of_their_steps(tmp_path: Path) -> None:
    caches = [GradientCache(tmp_path, rank=rank, world_size=2, max_samples_per_task=3) for rank in range(2)]
    for step in range(3):
        for rank, cache in enumerate(caches):
            cache.append(step, [captured([f"s{step}r{rank}"])])
    assert ids_in(caches[0]) == ids_in(caches[1]) == ["s1r1", "s2r0", "s2r1"]


def test_a_file_under_its_temporary_name_is_no_record_and_is_removed(tmp_path: Path) -> None:
    cache = GradientCache(tmp_path)
    cache.append(0, [captured(["a"])])
    (path,) = tmp_path.glob("*.safetensors")
    leftover = tmp_path / ".0000000001-00000-000.safetensors.tmp"
    leftover.write_bytes(path.read_bytes()[:100])
    assert ids_in(GradientCache(tmp_path)) == ["a"]
    assert not leftover.exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "no header", "other schema"])
def test_a_damaged_file_is_named_and_left_out(tmp_path: Path, damage: str) -> None:
    cache = GradientCache(tmp_path)
    for step in range(2):
        cache.append(step, [captured([f"s{step}"])])
    path = sorted(tmp_path.glob("*.safetensors"))[0]
    whole = path.read_bytes()
    if damage == "no header":
        save_file({"x": torch.zeros(1)}, path)
    elif damage == "other schema":
        save_file({"x": torch.zeros(1)}, path, {"qkov": json.dumps({"schema": 999})})
    else:
        path.write_bytes({"truncated": whole[:-10], "empty": b"", "garbage": os.urandom(500)}[damage])
    with pytest.warns(UserWarning, match=path.name):
        assert ids_in(GradientCache(tmp_path)) == ["s1"]


def test_a_flipped_bit_is_found_by_the_checksum(tmp_path: Path) -> None:
    cache = GradientCache(tmp_path)
    cache.append(0, [captured(["a"])])
    ((record, _),) = cache.records()
    data = bytearray(record.path.read_bytes())
    data[-3] ^= 1
    record.path.write_bytes(data)
    damaged = [name for name in ("q", "k", "o") if _fails(record, name)]
    assert len(damaged) == 1


def _fails(record: object, name: str) -> bool:
    try:
        record.read(name)  # type: ignore[attr-defined]
    except CacheError as error:
        return "does not match its checksum" in str(error)
    return False


Tamper = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]


def tamper(path: Path, change: Tamper) -> None:
    """Write a record again, changed by someone who knows the format and its checksums."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["qkov"])
    tensors = load_file(path)
    change(header, tensors)
    header["crc32"] |= {
        key: zlib.crc32(t.contiguous().flatten().view(torch.uint8).numpy().data) for key, t in tensors.items()
    }
    save_file(tensors, path, {"qkov": json.dumps(header)})


@pytest.mark.parametrize(
    "change",
    [
        lambda header, _: header["tasks"].append("one too many"),
        lambda header, _: header.update(scales=[4.0]),
        lambda header, _: header.update(tasks=[], ids=[], scales=[]),
        lambda header, _: header.update(scales="eval()"),
        lambda header, _: header.update(modules=["q"]),
        lambda header, _: header.update(modules={"q": {"activation": "elsewhere"}}),
        lambda header, _: header.update(step="first"),
    ],
)
def test_a_header_that_contradicts_itself_is_named_and_left_out(tmp_path: Path, change: Tamper) -> None:
    GradientCache(tmp_path).append(0, [captured(["a", "b"])])
    (path,) = tmp_path.glob("*.safetensors")
    tamper(path, change)
    with pytest.warns(UserWarning, match=rf"{path.name} is not a whole record"):
        assert GradientCache(tmp_path).records() == []


@pytest.mark.parametrize(
    "change",
    [
        lambda _, tensors: tensors.update({"offsets/0": torch.tensor([0, 2, 1_000_000_000])}),
        lambda _, tensors: tensors.update({"offsets/0": torch.tensor([0, 5, 4])}),
        lambda _, tensors: tensors.update({"offsets/0": torch.tensor([0, 4])}),
        lambda _, tensors: tensors.update({"offsets/0": torch.tensor([0.0, 2.0, 4.0])}),
        lambda _, tensors: tensors.update({"grad_output/q": torch.zeros(3, 8)}),
        lambda _, tensors: tensors.update({"activation/0": torch.zeros(4)}),
        lambda header, _: header["modules"]["q"].pop("offsets"),
        lambda header, _: header["modules"].update(q={"gradient": "activation/0"}),
    ],
)
def test_tensors_that_do_not_fit_the_samples_are_refused(tmp_path: Path, change: Tamper) -> None:
    GradientCache(tmp_path).append(0, [captured(["a", "b"])])
    (path,) = tmp_path.glob("*.safetensors")
    tamper(path, change)
    ((record, _),) = GradientCache(tmp_path).records()
    with pytest.raises(CacheError, match="the tensors of 'q' do not fit its 2 samples"):
        record.read("q")


def test_a_header_that_promises_more_than_the_file_holds_allocates_nothing(tmp_path: Path) -> None:
    """Eight terabytes by its header, a hundred bytes in truth."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**41], "data_offsets": [0, 2**43]}}).encode()
    path = tmp_path / "0000000000-00000-000.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.warns(UserWarning, match="is not a whole record"):
        assert GradientCache(tmp_path).records() == []


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cache directory .*file/cache cannot be written"):
        GradientCache(tmp_path / "file" / "cache")


def test_nothing_is_ever_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.mkdir, (str(tmp_path / "exploded"),))

    torch.save(Bomb(), tmp_path / "0000000000-00000-000.safetensors")
    with pytest.warns(UserWarning, match="is not a whole record"):
        assert GradientCache(tmp_path).records() == []
    assert not (tmp_path / "exploded").exists()
