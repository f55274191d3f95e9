"""On a GPU the numbers are the CPU's. Skipped where there is none; `make gpu` runs it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Classifier, GroupedAttention
from modules import Module, loader, trainer
from torch import Tensor, nn
from torch.nn import functional

from qkov_lightning import (
    GradientCapture,
    HeadFreezer,
    InterferenceMonitor,
    find_projections,
    head_interference,
    permutation_test,
    probe_interference,
    task,
    verify_capture,
)
from qkov_lightning.capture.loss_terms import read_loss
from qkov_lightning.capture.reductions import joining
from qkov_lightning.capture.samples import Samples

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


def test_a_probe_is_that_of_the_cpu() -> None:
    heatmaps = []
    for device in ("cpu", "cuda"):
        model = Classifier([GroupedAttention()], width=10).to(device)
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape))

        def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
            return functional.cross_entropy(model(batch["tokens"]), batch["target"])

        heatmaps.append(probe_interference(model, loader(24), loss=loss))
    torch.testing.assert_close(
        heatmaps[1].scores["relative"], heatmaps[0].scores["relative"], rtol=1e-3, atol=1e-6, equal_nan=True
    )
    torch.testing.assert_close(
        heatmaps[1].standard_errors["relative"], heatmaps[0].standard_errors["relative"], rtol=1e-2, atol=1e-5,
        equal_nan=True,
    )  # fmt: skip


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


def test_a_captured_step_waits_for_the_gpu_only_where_it_must() -> None:
    """Between the start and the end of the backward pass nothing asks the GPU for a number."""
    model = Classifier([GroupedAttention() for _ in range(2)], width=10).cuda()
    tokens = torch.arange(20, device="cuda").view(4, 5) % 11
    targets = torch.arange(4, device="cuda")
    with GradientCapture(model, find_projections(model), "mean") as capture:
        for _ in range(2):
            torch.cuda.set_sync_debug_mode("error")
            try:
                capture.start()
                with task(["a", "b", "a", "b"]):
                    loss = functional.cross_entropy(model(tokens), targets)
                capture.note_loss(loss)
                loss.backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert capture.finish()
