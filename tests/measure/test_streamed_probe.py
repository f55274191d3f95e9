"""A probe keeps no gradient, and says what a cache of all gradients says."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CausalSelfAttention, Classifier, GroupedAttention
from stored import filled, replicate, stored_heatmap
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from qkov_lightning import (
    InterferenceHeatmap,
    ScoreSettings,
    find_projections,
    probe_interference,
    register_architecture,
    task,
)
from qkov_lightning.heads.projections import BLOCKS, contiguous_heads
from qkov_lightning.measure.held import HotHead
from qkov_lightning.measure.jackknife import left_out_together
from qkov_lightning.measure.passes import ProbePasses
from qkov_lightning.measure.probe import _Measuring
from qkov_lightning.scores.reduction import Deal, SliceReduction
from qkov_lightning.scores.scores import SCORES

TASKS = ("code", "math", "prose")


@pytest.fixture(autouse=True)
def _small_batches_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """These are small models: their factors are larger than what may wait."""
    monkeypatch.setattr("qkov_lightning.measure.waiting.WAITING", 100)


class Packed(nn.Module):
    """An ``nn.MultiheadAttention`` with itself."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Adapted(nn.Module):
    """A linear layer that does not train, with a low-rank one beside it that does."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A, self.lora_B = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Checkpointed(Classifier):
    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = torch.tanh(x + checkpoint(layer, x, use_reentrant=False))
        return self.head(x.mean(dim=1))


def grouped() -> nn.Module:
    return Classifier([GroupedAttention() for _ in range(3)], width=10)


def adapted() -> nn.Module:
    model = grouped()
    for layer in model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer, name, Adapted(getattr(layer, name)))
    return model


MODELS: dict[str, Any] = {
    "grouped-query": grouped,
    "fused": lambda: Classifier([CausalSelfAttention() for _ in range(2)], width=12),
    "packed": lambda: Classifier([Packed() for _ in range(2)], width=12),
    "adapters": adapted,
    "checkpointed": lambda: Checkpointed([GroupedAttention() for _ in range(2)], width=10),
}


def made(name: str = "grouped-query", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().to(dtype)


def batches(count: int = 22, size: int = 5) -> list[dict[str, Any]]:
    """Two samples of code for every one of the other tasks; the last batch is a short one."""
    generator = torch.Generator().manual_seed(1)
    samples = [
        (torch.randint(11, (6,), generator=generator), torch.randint(5, (), generator=generator))
        for _ in range(count)
    ]
    result = []
    for start in range(0, count, size):
        own = range(start, min(start + size, count))
        result.append({
            "tokens": torch.stack([samples[i][0] for i in own]),
            "target": torch.stack([samples[i][1] for i in own]),
            "task": [TASKS[max(0, i % 4 - 1)] for i in own],
            "sample_id": [f"s{i}" for i in own],
        })
    return result


def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return functional.cross_entropy(model(batch["tokens"]), batch["target"])


def assert_equal_scores(
    found: InterferenceHeatmap, expected: InterferenceHeatmap, rtol: float = 1e-9, atol: float = 1e-12
) -> None:
    assert found.tasks == expected.tasks
    # Only the probe has proven them.
    assert [(one.name, one.blocks) for one in found.layers] == [
        (one.name, one.blocks) for one in expected.layers
    ]
    assert torch.equal(found.num_samples, expected.num_samples)
    for score in SCORES:
        torch.testing.assert_close(
            found.scores[score], expected.scores[score], rtol=rtol, atol=atol, equal_nan=True, msg=score
        )


@pytest.mark.parametrize(
    ("name", "update", "replicates"),
    [
        *((name, "adam", "linear") for name in MODELS),
        ("grouped-query", "sgd", "linear"),
        ("grouped-query", "adam", "exact"),
    ],
)
def test_scores_are_those_of_a_cache_of_all_gradients(
    tmp_path: Path, name: str, update: Any, replicates: Any
) -> None:
    model, settings = made(name), ScoreSettings(update=update, num_hot_cells=2)
    found = probe_interference(model, batches(), loss=loss, settings=settings, replicates=replicates)
    expected = stored_heatmap(tmp_path, made(name), batches(), loss, settings)
    assert_equal_scores(found, expected)
    assert found.notes["replicates"] == replicates


@pytest.mark.parametrize("name", ["grouped-query", "fused"])
def test_in_half_precision_the_sums_are_in_single_precision(tmp_path: Path, name: str) -> None:
    found = probe_interference(made(name, torch.bfloat16), batches(), loss=loss)
    expected = stored_heatmap(tmp_path, made(name, torch.bfloat16), batches(), loss)
    for score in ("interference", "relative", "cosine", "conflict", "loss_rise"):
        scale = float(expected.scores[score].nan_to_num().abs().max())
        torch.testing.assert_close(
            found.scores[score], expected.scores[score], rtol=1e-3, atol=1e-4 * scale, equal_nan=True
        )


def test_autocast_reaches_the_model_and_not_the_sums(tmp_path: Path) -> None:
    def amp(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(model, batch).float()

    expected = stored_heatmap(tmp_path, made(dtype=torch.float32), batches(), amp)
    with torch.autocast("cpu", torch.bfloat16):  # as a Trainer's precision plugin does
        found = probe_interference(made(dtype=torch.float32), batches(), loss=loss)
    scale = float(expected.scores["loss_rise"].nan_to_num().abs().max())
    torch.testing.assert_close(
        found.scores["loss_rise"], expected.scores["loss_rise"], rtol=1e-3, atol=1e-4 * scale, equal_nan=True
    )


def test_errors_without_groups_are_those_of_the_cache(tmp_path: Path) -> None:
    """One task has a single group: there is nothing to leave out, and no sample is independent of another."""
    alone = [batch | {"group": ["one"] * len(batch["task"])} for batch in batches()]
    found = probe_interference(made(), alone, loss=loss)
    assert "replicates" not in found.notes
    assert not found.replicates
    samples = [batch | {"task": ["code"] * len(batch["task"])} for batch in batches(2)]
    one = probe_interference(made(), samples, loss=loss, replicates="linear")
    assert one.notes["replicates"] == "linear"


@pytest.mark.parametrize("name", ["grouped-query", "packed"])
def test_exact_replicates_are_measurements_without_each_group(tmp_path: Path, name: str) -> None:
    model, settings = made(name), ScoreSettings(num_hot_cells=0)
    found = probe_interference(model, batches(), loss=loss, settings=settings, replicates="exact")
    projections = find_projections(model)
    cache = filled(tmp_path, made(name), batches(), loss, projections)
    tasks = [task for batch in batches() for task in batch["task"]]
    groups = left_out_together(tasks, [None] * len(tasks), found.notes["degrees_of_freedom"] + 1)
    for group in range(int(groups.max()) + 1):
        kept = (groups != group).nonzero().flatten().tolist()
        for projection in projections:
            expected = replicate(cache, projection, kept, settings)
            block = BLOCKS.index(projection.block)
            for score in SCORES:
                values = found.replicates[score][group][:, :, projection.layer, : projection.num_heads, block]
                # Six digits are kept.
                torch.testing.assert_close(values, expected[score], rtol=5.1e-6, atol=1e-15, msg=score)


def test_linear_replicates_come_close_to_exact_ones() -> None:
    """Of 160 samples, in the median cell: within a tenth of the standard error.

    Exact replicates deal the halves of a task anew, which `forgetting` feels, and linear ones do not.
    """
    settings = ScoreSettings(num_hot_cells=0)
    found = {
        kind: probe_interference(
            made(), batches(160, 40), loss=loss, settings=settings, replicates=kind
        ).standard_errors
        for kind in ("exact", "linear")
    }
    for score in SCORES:
        ratio = (found["linear"][score] / found["exact"][score])[~torch.eye(3, dtype=torch.bool)]
        low = 0.4 if score == "forgetting" else 0.9
        assert low < float(ratio.nanmedian()) < 1.1, score


def test_neither_memory_nor_a_second_run_changes_a_bit() -> None:
    settings = ScoreSettings(num_hot_cells=1)

    def measure(**options: Any) -> str:
        options = {"replicates": "linear", **options}
        return probe_interference(made(), batches(), loss=loss, settings=settings, **options).to_json()

    whole = measure()
    assert measure() == whole
    # Of 1,440 weights: 37 numbers of those that are weighed early, 31 otherwise.
    assert measure(max_memory_gb=1440 * 36 * 8 / 2**30) == whole
    # One projection of ten by twenty weights at a time.
    assert measure(max_memory_gb=200 * 35 * 8 / 2**30) == whole


def test_a_pass_that_derives_holds_the_gradients_of_likely_sample_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No pass is for the pairs alone, unless others than the likely ones turn out hot: the same pairs."""
    count = 0
    run = ProbePasses.run

    def counted(*arguments: Any) -> set[int]:
        nonlocal count
        count += 1
        return run(*arguments)

    def measure(**options: Any) -> tuple[InterferenceHeatmap, int]:
        nonlocal count
        count = 0
        settings = ScoreSettings(num_hot_cells=2)
        options = {"replicates": "linear", "settings": settings, **options}
        return probe_interference(made(), batches(), loss=loss, **options), count

    monkeypatch.setattr(ProbePasses, "run", counted)
    held, passes = measure()
    assert held.pairs
    assert passes == 3
    late, passes = measure(max_memory_gb=1440 * 36 * 8 / 2**30)
    assert passes == 4
    assert measure(replicates="exact")[1] == 3
    likely = _Measuring._likely

    def partly(*arguments: Any) -> list[HotHead]:
        first, second, *_ = likely(*arguments)
        return [first, replace(second, head=99)]  # one that is not hot

    for guess in (partly, lambda *_: []):
        monkeypatch.setattr(_Measuring, "_likely", guess)
        apart, passes = measure()
        assert passes == 4
        assert held.to_json() == apart.to_json() == late.to_json()


class LastToken(Classifier):
    """Reads its answer off the last token: the query of any other one has no gradient in the last layer."""

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = torch.tanh(x + layer(x))
        return self.head(x[:, -1])


@pytest.mark.parametrize("waiting", [2, 4, 100])
def test_tokens_that_others_need_change_no_bit(waiting: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a layer is cut in two, of which one part alone would drop all tokens but the last."""
    monkeypatch.setattr("qkov_lightning.measure.waiting.WAITING", waiting)

    def measure(max_numbers: int) -> str:
        torch.manual_seed(0)
        model = LastToken([GroupedAttention() for _ in range(2)], width=10).double()
        return probe_interference(
            model,
            batches(size=2),
            loss=loss,
            settings=ScoreSettings(num_hot_cells=2),
            replicates="linear",
            max_memory_gb=max_numbers * 8 / 2**30,
        ).to_json()

    whole = measure(10**6)
    for max_numbers in (960 * 36, 960 * 34, 960 * 31, 700 * 31, 400 * 31):
        assert measure(max_numbers) == whole


def test_sums_that_only_comparing_needs_are_freed() -> None:
    """Magnitudes and cubes of both tasks: 4 of 10 numbers a weight, and memory of their own."""
    deal = Deal.of(torch.tensor([0, 1]), torch.arange(2), torch.ones(2), 2)
    gradients = torch.randn(2, 3, 1000)
    reduction = SliceReduction(deal, gradients.new_ones(()).expand(3, 1000), 1e-3, "adam", 0.01, True)
    reduction.add(gradients, torch.arange(2))
    reduction.compare(gradients, torch.arange(2))

    def held() -> int:
        tensors = [one for one in vars(reduction._sums).values() if isinstance(one, Tensor)]
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
        return sum(size for size in storages.values() if size > 1000)

    before = held()
    reduction.compared()
    assert (before, held()) == (10 * 3000 * 4, 6 * 3000 * 4)


def test_more_sweeps_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    for module in ("probe", "sweeps"):
        monkeypatch.setattr(f"qkov_lightning.measure.{module}.rank_zero_info", said.append)
    probe_interference(made(), batches(), loss=loss, replicates="exact", max_memory_gb=3e-4)
    text = " ".join(said)
    assert "22 samples, " in text
    assert "3 sweeps, 6 passes over them" in text
    assert "minutes in all" in text


def test_exact_replicates_are_taken_where_they_fit() -> None:
    small = probe_interference(made(), batches(), loss=loss, max_memory_gb=1.0)
    large = probe_interference(made(), batches(), loss=loss, max_memory_gb=3e-4)
    assert small.notes["replicates"] == "exact"
    assert large.notes["replicates"] == "linear"
    assert_equal_scores(small, large)


def test_samples_that_only_the_forward_pass_knows(tmp_path: Path) -> None:
    """Two forward passes a batch, each inside ``with task(...)``."""

    def in_turn(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for name in sorted(set(batch["task"])):
            rows = [i for i, own in enumerate(batch["task"]) if own == name]
            with task(name, sample_ids=[batch["sample_id"][i] for i in rows]):
                part = functional.cross_entropy(
                    model(batch["tokens"][rows]), batch["target"][rows], reduction="sum"
                )
            total = total + part
        return total

    found = probe_interference(made(), batches(), loss=in_turn, replicates="linear")
    assert_equal_scores(found, stored_heatmap(tmp_path, made(), batches(), in_turn))


def test_a_layer_that_some_batches_pass_by_lacks_their_samples(tmp_path: Path) -> None:
    def some(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        model.layers[1].skip = batch["sample_id"][0] == "s5"
        return loss(model, batch)

    class Skipping(GroupedAttention):
        skip = False

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return x if self.skip else super().forward(x, mask)

    def model() -> nn.Module:
        torch.manual_seed(0)
        return Classifier([GroupedAttention(), Skipping()], width=10).double()

    found = probe_interference(model(), batches(), loss=some)
    expected = stored_heatmap(tmp_path, model(), batches(), some)
    assert torch.equal(found.num_samples, expected.num_samples)
    for score in ("interference", "relative", "cosine", "conflict"):
        torch.testing.assert_close(
            found.scores[score], expected.scores[score], rtol=1e-9, atol=1e-12, equal_nan=True
        )


def test_batches_that_change_from_pass_to_pass_are_refused() -> None:
    class Restless(torch.utils.data.Dataset):
        reads = 0

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict[str, Any]:
            self.reads += 1
            return {
                "tokens": torch.full((6,), self.reads % 11),
                "target": index % 5,
                "task": TASKS[index % 2],
            }

    with pytest.raises(ValueError, match="Batch 0 is another one when the probe is read again"):
        probe_interference(made(), torch.utils.data.DataLoader(Restless(), 2), loss=loss)


def test_augmented_samples_are_the_same_in_every_pass() -> None:
    class Augmented(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"tokens": torch.randint(11, (6,)), "target": index % 5, "task": TASKS[index % 2]}

    def noisy(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        torch.rand(3)
        return loss(model, batch)

    loader = torch.utils.data.DataLoader(Augmented(), 2)
    first = probe_interference(made(), loader, loss=noisy)
    assert first.to_json() == probe_interference(made(), loader, loss=noisy).to_json()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_memory_gb holds the sums of 4 weights .* Raise max_memory_gb"):
        probe_interference(made(), batches(), loss=loss, max_memory_gb=1e-6, replicates="linear")
    with pytest.raises(ValueError, match=r"max_memory_gb is 0\.0, expected a positive number"):
        probe_interference(made(), batches(), loss=loss, max_memory_gb=0.0)


def test_no_gradient_outlives_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all bytes that live tensors hold when the last batch begins, where no gradients wait."""
    monkeypatch.setattr("qkov_lightning.measure.waiting.WAITING", 0)

    def peak(count: int) -> int:
        largest = 0

        def watched(model: nn.Module, batch: dict[str, Any]) -> Tensor:
            nonlocal largest
            if batch["sample_id"][0] != f"s{count - 4}":
                return loss(model, batch)
            tensors = [one for one in gc.get_objects() if type(one) is Tensor and one.numel() > 99]
            storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
            largest = max(largest, sum(storages.values()))
            return loss(model, batch)

        torch.manual_seed(0)
        model = Classifier([GroupedAttention(width=40)], width=40).double()
        settings = ScoreSettings(num_hot_cells=0)
        probe_interference(model, batches(count, 4), loss=watched, replicates="linear", settings=settings)
        return largest

    # Forty numbers for each sample and head; the gradients of a sample are 1,920 weights.
    assert peak(28) - peak(12) < 16 * 12 * 50 * 8 < 16 * 1920 * 8


def test_the_heads_of_other_architectures_are_swept(tmp_path: Path) -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values, self.out = nn.Linear(10, 10), nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.values(x)))

    register_architecture(
        "Strange",
        lambda attention: {"V": ("values", contiguous_heads(2, 5)), "O": ("out", contiguous_heads(2, 5))},
    )
    torch.manual_seed(0)
    model = Classifier([Strange(), Strange()], width=10).double()
    found = probe_interference(model, batches(), loss=loss)
    assert_equal_scores(found, stored_heatmap(tmp_path, model, batches(), loss))
