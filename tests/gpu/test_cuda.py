"""On a GPU the numbers are the CPU's. Skipped where there is none; `make gpu` runs it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from models import Classifier, GroupedAttention
from modules import Module, loader, trainer
from torch import Tensor, nn
from torch.nn import functional

from qkov_lightning import (
    GradientCache,
    GradientCapture,
    HeadFreezer,
    HeadInterference,
    HeadProjector,
    InterferenceMonitor,
    find_projections,
    head_interference,
    permutation_test,
    probe_interference,
    verify_capture,
)
from qkov_lightning.capture.factors import CapturedStep, GradientFactors
from qkov_lightning.capture.loss_terms import read_loss
from qkov_lightning.capture.reductions import joining
from qkov_lightning.capture.samples import Samples, label_samples
from qkov_lightning.heads.projected import ProjectedWeight, SubspaceRule
from qkov_lightning.heads.slices import FrozenSlice
from qkov_lightning.measure.recording import Recording
from qkov_lightning.store.fitting import Budget
from qkov_lightning.store.writer import CacheWriter

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings(
        "ignore:.*does not have many workers.*",
        "ignore:.*smaller than the logging interval.*",
        "ignore:You defined a `validation_step` but have no `val_dataloader`.*",
        "ignore:.*sync_dist.*",
    ),
]

# Products of 8 bits (bfloat16) and 11 bits (float16), averaged over weights and samples.
TOLERANCE = {"32-true": 1e-3, "bf16-mixed": 0.05, "16-mixed": 0.01}


@pytest.fixture(autouse=True)
def _exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def fit(
    tmp_path: Path, accelerator: str, module: Module | None = None, **settings: Any
) -> InterferenceMonitor:
    storage = settings.pop("storage", "factors")
    monitor = InterferenceMonitor(every_n_steps=1, storage=storage)
    fitted = trainer(tmp_path / accelerator, monitor, accelerator=accelerator, devices=1, **settings)
    fitted.fit(module or Module(learning_rate=0.0), loader(24), loader(8))
    assert monitor.heatmap is not None
    return monitor


@pytest.mark.parametrize("precision", list(TOLERANCE))
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_heatmap_is_that_of_the_cpu(tmp_path: Path, precision: Any, accumulate: int) -> None:
    expected = fit(tmp_path, "cpu", accumulate_grad_batches=accumulate).heatmap
    found = fit(tmp_path, "gpu", precision=precision, accumulate_grad_batches=accumulate).heatmap
    for score in ("interference", "relative"):
        torch.testing.assert_close(
            found.scores[score], expected.scores[score], rtol=TOLERANCE[precision], atol=1e-6, equal_nan=True
        )
    error = "interference"
    torch.testing.assert_close(
        found.standard_errors[error], expected.standard_errors[error], rtol=5 * TOLERANCE[precision], atol=1e-5,
        equal_nan=True,
    )  # fmt: skip
    assert found.notes["non_finite_steps"] == 0


def test_training_is_bit_identical_with_and_without_the_monitor(tmp_path: Path) -> None:
    states = []
    for watched in (False, True):
        module = Module(dropout=0.1)
        monitors = [InterferenceMonitor(every_n_steps=2)] if watched else []
        fitted = trainer(tmp_path / str(watched), *monitors, accelerator="gpu", devices=1, deterministic=True)
        torch.manual_seed(1)
        fitted.fit(module, loader(24), loader(8))
        states.append({key: value.cpu() for key, value in module.state_dict().items()})
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_sampled_storage_runs(tmp_path: Path) -> None:
    heatmap = fit(tmp_path, "gpu", storage="sampled").heatmap
    assert heatmap.notes["storage"] == "sampled"
    assert bool(heatmap.values("math", "code")[:, :4, 0].isfinite().all())


def test_summed_storage_is_that_of_the_cpu(tmp_path: Path) -> None:
    expected, found = (fit(tmp_path, where, storage="summed").heatmap for where in ("cpu", "gpu"))
    assert found.notes["storage"] == "summed"
    for score in ("interference", "relative", "cosine", "conflict"):
        torch.testing.assert_close(
            found.scores[score], expected.scores[score], rtol=1e-3, atol=1e-4, equal_nan=True
        )


class TokenMean(Module):
    """Next-token prediction over 1 to 4 target tokens a sample."""

    def __init__(self) -> None:
        torch.manual_seed(3)  # the same network each time
        super().__init__(learning_rate=0.0, network=Classifier([GroupedAttention()], width=10, classes=11))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        tokens = batch["tokens"]
        lengths = 1 + tokens.sum(dim=1, keepdim=True) % 4
        targets = tokens[:, 1:].masked_fill(torch.arange(4, device=tokens.device) >= lengths, -100)
        x = self.network.embedding(tokens)
        scores = self.network.head(torch.tanh(x + self.network.layers[0](x)))
        return functional.cross_entropy(scores[:, :-1].flatten(0, 1), targets.flatten())

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        pass


def test_the_reduction_of_the_loss_is_read_on_the_gpu_too(tmp_path: Path) -> None:
    expected, found = (fit(tmp_path, where, TokenMean()).heatmap for where in ("cpu", "gpu"))
    torch.testing.assert_close(
        found.scores["relative"], expected.scores["relative"], rtol=1e-3, atol=1e-6, equal_nan=True
    )
    scores = torch.randn(3, 6, 5, device="cuda", requires_grad=True)
    targets = torch.tensor(
        [[1, 4, 2, -100, -100, -100], [0, 0, 3, 1, 4, -100], [2, 2, 1, 0, 4, 3]], device="cuda"
    )
    loss = functional.cross_entropy(scores.flatten(0, 1), targets.flatten())
    assert joining(Samples(("a",) * 3, ("0", "1", "2")), "auto", read_loss(loss)).num_target_tokens == (
        3,
        5,
        6,
    )


def test_captured_gradients_are_those_of_autograd() -> None:
    model = Module(learning_rate=0.0).cuda()
    batch = {
        "tokens": torch.arange(20, device="cuda").view(4, 5) % 11,
        "target": torch.arange(4, device="cuda"),
    }
    assert verify_capture(model, batch).passed


def test_frozen_cells_stay_bit_identical(tmp_path: Path) -> None:
    module = Module()
    before = copy.deepcopy(module.network.layers[0].q_proj.weight.detach())
    freezer = HeadFreezer(["L0.H1.Q"])
    trainer(tmp_path, freezer, accelerator="gpu", devices=1).fit(module, loader(24))
    after = module.network.layers[0].q_proj.weight.detach().cpu()
    rows = find_projections(module)[0].head_features[1]
    assert torch.equal(after[rows], before[rows])
    others = [row for row in range(len(after)) if row not in rows.tolist()]
    assert not torch.equal(after[others], before[others])


def test_projected_training_is_that_of_the_cpu(tmp_path: Path) -> None:
    weights = []
    for where in ("cpu", "gpu"):
        module, projector = Module(), HeadProjector(loader(8), rank=0.5)
        trainer(tmp_path / where, projector, accelerator=where, devices=1).fit(module, loader(24))
        assert projector.taken is not None
        assert bool((projector.taken[:, :2].nan_to_num(0.0) > 0).any())
        weights.append({key: value.cpu() for key, value in module.state_dict().items()})
    for key, value in weights[0].items():
        # Rounding grows over the steps of a training.
        torch.testing.assert_close(weights[1][key], value, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("replicates", ["exact", "linear"])
def test_a_probe_is_that_of_the_cpu(
    precision: torch.dtype | None, replicates: Literal["exact", "linear"]
) -> None:
    heatmaps = []
    for device in ("cpu", "cuda"):
        model = Classifier([GroupedAttention()], width=10)
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape))

        def loss(model: nn.Module, batch: dict[str, Any], device: str = device) -> Tensor:
            lower = device == "cuda" and precision is not None
            with torch.autocast(device, precision if lower else None, enabled=lower):
                return functional.cross_entropy(model(batch["tokens"]), batch["target"])

        heatmaps.append(probe_interference(model.to(device), loader(24), loss=loss, replicates=replicates))
    exact = 1e-3 if precision is None else 0.1
    torch.testing.assert_close(
        heatmaps[1].scores["relative"], heatmaps[0].scores["relative"], rtol=exact, atol=exact * 1e-2,
        equal_nan=True,
    )  # fmt: skip
    torch.testing.assert_close(
        heatmaps[1].standard_errors["relative"], heatmaps[0].standard_errors["relative"], rtol=10 * exact,
        atol=exact * 1e-1, equal_nan=True,
    )  # fmt: skip


def test_the_metric_is_that_of_the_cpu() -> None:
    x = torch.randn(12, 2, 40)
    tasks, fisher = ["a", "b"] * 6, x.square().mean(dim=0)
    results = []
    for device in ("cpu", "cuda"):
        metric = HeadInterference(["a", "b"], num_layers=1, num_heads=2).to(device)
        metric.update(x.to(device), tasks, fisher.to(device), layer=0, block="Q")
        results.append({name: value.cpu() for name, value in metric.compute().items()})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-5, equal_nan=True)


def test_the_functions_take_tensors_of_the_gpu() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 2, 40, generator=generator, dtype=torch.float64)
    tasks, fisher = ["a", "b"] * 6, x.square().mean(dim=0)
    shares = torch.full((12,), 1 / 12, dtype=torch.float64)
    expected = head_interference(x, tasks, fisher, fisher_shares=shares)["a", "b"]
    found = head_interference(x.cuda(), tasks, fisher.cuda(), fisher_shares=shares.cuda())["a", "b"]
    for name, values in expected.items():
        torch.testing.assert_close(found[name].cpu(), values)
    is_a = torch.arange(12) % 2 == 0
    torch.testing.assert_close(
        permutation_test(x.cuda(), is_a).p_value, permutation_test(x, is_a).p_value, rtol=0, atol=0.01
    )


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error wherever the processor waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_step_waits_for_the_gpu_only_when_it_ends() -> None:
    """Which waits those are: `WAITS` in `test_without_a_gpu.py`."""
    model = Classifier([GroupedAttention() for _ in range(2)], width=10).cuda()
    tokens = torch.arange(20, device="cuda").view(4, 5) % 11
    targets = torch.arange(4, device="cuda")
    scaler = torch.amp.GradScaler("cuda")
    scaler.scale(torch.ones((), device="cuda"))  # makes its scale, once
    recording = Recording("factors", Budget(4, 2**20, 2**20))
    recording.capture = GradientCapture(model, find_projections(model))
    labels = label_samples(["a", "b"] * 2, list("wxyz"))
    for _ in range(2):
        with no_waiting():
            recording.start(every_n_steps=1)
            loss = scaler.scale(functional.cross_entropy(model(tokens), targets))
            recording.note_loss(loss, accumulated=1, scaler=scaler)
            loss.backward()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            assert recording.capture.finish(lambda: labels)
        torch.cuda.set_sync_debug_mode("default")
        assert len([one for one in waits if "synchroniz" in str(one.message)]) <= 3


def test_frozen_and_projected_weights_wait_for_nothing_in_a_step() -> None:
    query = nn.Parameter(torch.randn(8, 6, device="cuda"))
    basis = torch.linalg.qr(torch.randn(1, 6, 2))[0]
    projected = ProjectedWeight("query", query, 1, [SubspaceRule(torch.arange(4)[None], None, basis)])
    frozen = FrozenSlice(query, 0, [4, 5])
    optimizer = torch.optim.SGD([query], lr=0.1)
    x = torch.randn(3, 6, device="cuda")
    frozen.remember()  # takes the indices to the GPU
    frozen.forget()
    with no_waiting():
        for _ in range(2):
            (x @ query.T).square().sum().backward()
            frozen.remember()
            frozen.remove_gradient()
            projected.remember()
            optimizer.step()
            projected.project()
            frozen.put_back()
            frozen.forget()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_step_on_the_second_gpu_is_written_as_it_is(tmp_path: Path) -> None:
    cache = GradientCache(tmp_path)
    writer = CacheWriter(cache)
    ones = torch.ones(2, dtype=torch.float64)
    for number in range(4):
        values = torch.full((4096, 512), float(number + 1), device="cuda:1")
        factors = GradientFactors(values, values.clone(), torch.tensor([0, 2048, 4096]))
        samples = Samples(("a", "b"), (f"{number}a", f"{number}b"))
        writer.submit(number, [CapturedStep(samples, ones, ones, {"q": factors})])
    writer.drain()
    writer.close()
    for number, (record, _) in enumerate(cache.records()):
        assert bool((record.read("q").gradient == 2048 * (number + 1) ** 2).all())
