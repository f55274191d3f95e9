"""Sample pairs: which sample's step raises which sample's loss, found by hand and tried out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from modules import Module, Samples, loader, trainer
from torch import Tensor

from qkov_lightning import (
    InterferenceMonitor,
    ScoreSettings,
    find_projections,
    head_interference,
    pair_harm,
    probe_interference,
)
from qkov_lightning.measure.cells import SamplePair

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`.*"),
]

SAMPLES = Samples(24)
NUMBER = {f"sample-{index}": index for index in range(24)}


def loss_of(module: Module, name: str) -> Tensor:
    item = SAMPLES[NUMBER[name]]
    batch = {key: value[None] for key, value in item.items() if isinstance(value, Tensor)}
    return module.loss(batch)


def gradient(module: Module, pair: SamplePair, name: str) -> Tensor:
    """Of the sample's own loss, in the cell alone; zero elsewhere in the weight."""
    (projection,) = [
        one for one in find_projections(module) if (one.layer, one.block) == (pair.layer, pair.block)
    ]
    weight = module.get_submodule(projection.module_name).weight
    (whole,) = torch.autograd.grad(loss_of(module, name), [weight])
    own, features = torch.zeros_like(whole), projection.head_features[pair.head]
    where = (slice(None), features) if pair.block == "O" else (features,)
    own[where] = whole[where]
    return own


def names_of(task: str) -> list[str]:
    return [name for name, index in NUMBER.items() if SAMPLES[index]["task"] == task]


@pytest.mark.parametrize("update", ["sgd", "adam"])
def test_harm_is_the_slope_of_one_sample_along_the_update_of_the_other(update: Any) -> None:
    module, settings = Module(), ScoreSettings(update=update, num_hot_cells=3, step_size=0.1)
    heatmap = probe_interference(module, list(loader(24)), settings=settings)
    assert {(pair.task_a, pair.task_b) for pair in heatmap.pairs} == set(heatmap.task_pairs)
    for pair in heatmap.pairs:
        of_a, of_b = (gradient(module, pair, name).double() for name in (pair.sample_a, pair.sample_b))
        rate = torch.ones_like(of_b)
        if update == "adam":
            square = sum(gradient(module, pair, name).double().square() for name in names_of(pair.task_b))
            square = square / len(names_of(pair.task_b))
            inside = square[square > 0] if (square > 0).any() else square
            size = heatmap_cell_size(module, pair)
            rate = (square + settings.damping * inside.sum() / size).rsqrt()
        assert pair.harm == pytest.approx(float(-0.1 * (of_a * rate * of_b).sum()), rel=1e-4)
    assert [pair.harm for pair in heatmap.pairs] == sorted((p.harm for p in heatmap.pairs), reverse=True)


def heatmap_cell_size(module: Module, pair: SamplePair) -> int:
    (projection,) = [
        one for one in find_projections(module) if (one.layer, one.block) == (pair.layer, pair.block)
    ]
    weight = module.get_submodule(projection.module_name).weight
    return len(projection.head_features[pair.head]) * weight.shape[0 if pair.block == "O" else 1]


def test_pairs_named_as_hurting_do_hurt_when_the_step_is_taken() -> None:
    """One small step of SGD in the cell along the second sample's gradient raises the first one's loss."""
    module = Module()
    heatmap = probe_interference(module, list(loader(24)), settings=ScoreSettings(update="sgd"))
    rose = []
    for pair in heatmap.pairs:
        before = loss_of(module, pair.sample_a).item()
        step = gradient(module, pair, pair.sample_b)
        (projection,) = [
            one for one in find_projections(module) if (one.layer, one.block) == (pair.layer, pair.block)
        ]
        weight = module.get_submodule(projection.module_name).weight
        with torch.no_grad():
            weight -= 0.1 * step
            rose.append(loss_of(module, pair.sample_a).item() > before)
            weight += 0.1 * step
    assert len(rose) >= 40
    assert sum(rose) >= 0.9 * len(rose)


def test_the_mean_harm_over_pairs_is_the_slope_of_the_loss_rise() -> None:
    generator = torch.Generator().manual_seed(0)
    of_a, of_b = torch.randn(2, 30, 40, generator=generator, dtype=torch.float64)
    harm = pair_harm(of_a, of_b, torch.ones(40, dtype=torch.float64), step_size=1e-6)
    tasks = ["a"] * 30 + ["b"] * 30
    fisher = torch.cat([of_a, of_b]).square().mean(dim=0)
    scores = head_interference(
        torch.cat([of_a, of_b])[:, None], tasks, fisher[None], update="sgd", step_size=1e-6
    )
    # At so short a step the curvature is nothing.
    assert float(harm.mean()) == pytest.approx(float(scores["a", "b"]["loss_rise"]), rel=1e-4)


def test_pairs_come_from_the_cells_that_the_verdict_names_first() -> None:
    heatmap = probe_interference(Module(), list(loader(24)), settings=ScoreSettings(num_hot_cells=2))
    for pair in heatmap.pairs:
        first = heatmap.verdict.pair(pair.task_a, pair.task_b).cells[:2]
        assert pair.name in {cell.name for cell in first}


@pytest.mark.parametrize("source", ["text", lambda batch: [f"text of {i}" * 40 for i in batch["sample_id"]]])
def test_texts_stand_beside_the_samples(tmp_path: Path, source: Any) -> None:
    class WithText(Samples):
        def __getitem__(self, index: int) -> dict[str, Any]:
            item = super().__getitem__(index)
            return item | {"text": f"text of {item['sample_id']}" * 40}

    monitor = InterferenceMonitor(every_n_steps=1, num_hot_cells=1, sample_text_of=source)
    trainer(tmp_path, monitor).fit(Module(), torch.utils.data.DataLoader(WithText(24), batch_size=4))
    assert monitor.heatmap.pairs
    for pair in type(monitor.heatmap).load(tmp_path / "interference" / "latest.json").pairs:
        assert pair.text_a == (f"text of {pair.sample_a}" * 40)[:120]
        assert pair.text_b == (f"text of {pair.sample_b}" * 40)[:120]


def test_without_the_option_no_text_is_kept(tmp_path: Path) -> None:
    monitor = InterferenceMonitor(every_n_steps=1, num_hot_cells=1)
    trainer(tmp_path, monitor).fit(Module(), loader(24))
    assert {(pair.text_a, pair.text_b) for pair in monitor.heatmap.pairs} == {(None, None)}


def test_a_key_without_texts_is_refused(tmp_path: Path) -> None:
    for key, found in (("prompt", "no entry"), ("tokens", "a tensor")):
        monitor = InterferenceMonitor(every_n_steps=1, sample_text_of=key)
        with pytest.raises(ValueError, match=f"sample_text_of is '{key}', where the batch has {found}"):
            trainer(tmp_path, monitor).fit(Module(), loader(8))
