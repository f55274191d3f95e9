"""What measuring fixed samples at the current weights promises."""

import copy
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from oracles import batch_of_one_gradients
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from qkov_lightning import (
    InterferenceHeatmap,
    InterferenceMonitor,
    ScoreSettings,
    find_projections,
    head_interference,
    probe_interference,
)
from qkov_lightning.capture.rehearsal import _fixed_randomness
from qkov_lightning.heads.projections import BLOCKS
from qkov_lightning.measure.certainty import jackknife_error

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*No `predict_dataloader`"),
]

WIDTH, HEADS = 12, 3


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            project(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Model(LightningModule):
    """Everything that a careless measurement would disturb.

    Dropout, batch norm, a metric, a counter, logging.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(WIDTH, 1)
        self.seen = MeanMetric(nan_strategy="ignore")
        self.history: list[float] = []
        self.register_buffer("calls", torch.zeros(()))
        self.num_calls = 0

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.dropout(x + self.attention(x))
        return self.head(self.norm(hidden.mean(dim=1))).squeeze(-1)

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        loss = (self.predict(batch["x"]) - batch["y"]).square().mean()
        self.log("loss", loss, batch_size=len(batch["x"]))
        self.seen(loss.detach())
        self.history.append(float(loss.detach()))
        self.calls += 1
        self.num_calls += 1
        torch.rand(1), random.random(), np.random.rand()
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.log("val_loss", (self.predict(batch["x"]) - batch["y"]).square().mean(), batch_size=8)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def make_samples(count: int = 16, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(5, WIDTH, generator=generator),
            "y": torch.randn((), generator=generator),
            "task": ("code", "math")[i % 2],
            "sample_id": f"s{i}",
        }
        for i in range(count)
    ]


def loader(samples: list[dict], **kwargs: object) -> DataLoader:
    return DataLoader(samples, **{"batch_size": 4, **kwargs})


def same(a: object, b: object) -> bool:
    """Bit for bit, NaN included."""
    return a.to_json() == b.to_json()


def test_scores_are_those_of_gradients_taken_sample_by_sample_with_the_plain_mean_fisher() -> None:
    model, samples = Model(), make_samples()
    heatmap = probe_interference(model, loader(samples))
    reference = copy.deepcopy(model).eval().double()
    gradients: dict[str, list[torch.Tensor]] = {}
    for sample in samples:
        reference.zero_grad()
        prediction = reference.predict(sample["x"].double()[None])
        (prediction[0] - sample["y"].double()).square().backward()
        for block, name in zip(BLOCKS, ("q_proj", "k_proj", "v_proj", "o_proj"), strict=True):
            weight = reference.attention.get_submodule(name).weight.grad
            rows = weight.T if block == "O" else weight
            gradients.setdefault(block, []).append(rows.reshape(HEADS, -1).clone())
    tasks = [sample["task"] for sample in samples]
    for index, block in enumerate(BLOCKS):
        stacked = torch.stack(gradients[block])
        means = [stacked[start::2].square().mean(dim=0) for start in range(2)]
        expected = head_interference(stacked, tasks, (means[0] + means[1]) / 2)
        for score in ("interference", "relative", "cosine"):
            # Gradients were captured in float32.
            torch.testing.assert_close(
                heatmap.values("code", "math", score)[0, :, index],
                expected["code", "math"][score],
                rtol=1e-4,
                atol=1e-6,
            )
    assert heatmap.notes["fisher"] == "mean over the probe"


def test_the_fisher_weighs_every_task_the_same_however_many_samples_it_has() -> None:
    """With two samples of one task in the first batch and all others after it."""
    samples = make_samples(20)
    lopsided = samples[0:2] + samples[2::2] + samples[3:7:2]
    model = Model()
    whole = probe_interference(model, loader(lopsided, batch_size=len(lopsided)))
    parts = probe_interference(model, loader(lopsided, batch_size=3))
    for score in ("interference", "relative", "cosine"):
        torch.testing.assert_close(whole.scores[score], parts.scores[score], rtol=1e-4, atol=1e-6)


def test_two_measurements_of_one_checkpoint_are_bit_identical() -> None:
    model, probe = Model(), loader(make_samples())
    first = probe_interference(model, probe)
    torch.rand(7), random.random()
    second = probe_interference(model, probe)
    restored = Model()
    restored.load_state_dict(model.state_dict())
    third = probe_interference(restored.train(), loader(make_samples()))
    assert same(first, second)
    assert same(first, third)


def test_the_same_samples_are_known_by_their_content() -> None:
    """Not by their identifiers, which may be running numbers, nor by the weights."""

    def fingerprint(samples: list[dict], model: Model | None = None) -> str:
        return probe_interference(model or Model(), loader(samples)).notes["samples"]

    expected = fingerprint(make_samples())
    assert fingerprint(make_samples(), Model()) == expected
    for key, other in {"x": torch.zeros(5, WIDTH), "y": torch.ones(()), "sample_id": "other"}.items():
        samples = make_samples()
        samples[3] = {**samples[3], key: other}
        assert fingerprint(samples) != expected
    assert fingerprint(make_samples()[::-1]) != expected


def test_standard_errors_are_those_of_the_replicates() -> None:
    heatmap = probe_interference(Model(), loader(make_samples()))
    for score, values in heatmap.replicates.items():
        assert len(values) == heatmap.notes["degrees_of_freedom"] + 1
        torch.testing.assert_close(jackknife_error(values), heatmap.standard_errors[score], equal_nan=True)
    restored = InterferenceHeatmap.from_json(heatmap.to_json())
    assert same(heatmap, restored)
    for score, values in heatmap.replicates.items():
        torch.testing.assert_close(restored.replicates[score], values, rtol=0, atol=0, equal_nan=True)


def test_nothing_of_the_model_or_the_run_changes() -> None:
    model = Model().train()
    model.attention.k_proj.eval()
    model.predict(torch.randn(4, 5, WIDTH)).sum().backward()
    model.seen.update(3.0)
    generator = torch.Generator().manual_seed(5)
    probe = loader(make_samples(), generator=generator)
    parameters = {
        name: (p, p.detach().clone(), p.grad, p.grad.clone()) for name, p in model.named_parameters()
    }
    buffers = {name: (b, b.clone()) for name, b in model.named_buffers()}
    modes = {name: module.training for name, module in model.named_modules()}
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    history, metric = list(model.history), model.seen.compute().clone()
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), generator.get_state()

    probe_interference(model, probe)

    for name, parameter in model.named_parameters():
        before, value, grad, grad_value = parameters[name]
        assert parameter is before
        assert parameter.grad is grad
        assert torch.equal(parameter, value)
        assert torch.equal(grad, grad_value)
    assert all(
        b is buffers[name][0] and torch.equal(b, buffers[name][1]) for name, b in model.named_buffers()
    )
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooks
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert model.num_calls == 0
    assert model.history == history
    assert torch.equal(model.seen.compute(), metric)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(generator.get_state(), states[2])


def test_the_random_numbers_of_python_go_on_as_if_nothing_had_been() -> None:
    """Inside the measurement: around it, the type checks of these tests draw numbers of their own."""
    random.seed(3)
    with _fixed_randomness():
        inside = random.random()
    outside = random.random()
    random.seed(3)
    assert outside == random.random()
    assert inside != outside


def test_a_failing_step_leaves_the_model_as_found_too() -> None:
    model = Model().train()
    batches = [*loader(make_samples(4)), {"x": torch.zeros(1, 5, 3), "task": "code"}]
    with pytest.raises(RuntimeError, match="shape"):
        probe_interference(model, batches)
    assert model.training
    assert model.num_calls == 0
    assert "log" not in vars(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_an_optimiser_that_steps_inside_the_backward_pass_does_not_step() -> None:
    model = Model()
    stepped = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: stepped.append(p))
    probe_interference(model, loader(make_samples()))
    assert stepped == []


@pytest.mark.parametrize("own_loss", ["mean", "sum"])
def test_the_curvature_counts_the_target_tokens_of_each_sample(own_loss: str) -> None:
    """Samples of 1 to 5 targets. Where a sample's loss is their sum, there is nothing to count."""
    model = Attention()
    samples = make_samples()
    labels = torch.randint(WIDTH, (len(samples), 5))
    for row, own in enumerate(labels):
        own[1 + row % 5 :] = -100
    counts = (labels != -100).sum(dim=1)

    def loss(model: nn.Module, batch: dict) -> torch.Tensor:
        scores = model(batch["x"]).flatten(0, 1)
        return functional.cross_entropy(scores, batch["labels"].flatten(), reduction=own_loss)

    def alone(index: int) -> torch.Tensor:
        return loss(model, {"x": samples[index]["x"][None], "labels": labels[index]})

    batches = loader([sample | {"labels": own} for sample, own in zip(samples, labels, strict=True)])
    heatmap = probe_interference(model, batches, loss=loss, settings=ScoreSettings(update="sgd"))
    weights = {"V": model.v_proj.weight}
    gradients = (
        batch_of_one_gradients(model, weights, alone, len(samples))["V"].unflatten(1, (HEADS, -1)).flatten(2)
    )
    tasks = [sample["task"] for sample in samples]
    fisher = gradients.square().mean(dim=0)
    num_terms = counts.double() if own_loss == "mean" else None
    expected = head_interference(gradients, tasks, fisher, update="sgd", num_terms=num_terms)["math", "code"]
    for score in ("forgetting", "loss_rise"):
        found = heatmap.values("math", "code", score)[0, :, BLOCKS.index("V")]
        torch.testing.assert_close(found, expected[score], rtol=1e-4, atol=1e-9)


def test_a_plain_module_is_measured_with_a_loss_of_the_users() -> None:
    model = Model()

    def loss(model: nn.Module, batch: dict) -> torch.Tensor:
        return (model.predict(batch["x"]) - batch["y"]).square().sum()

    own = probe_interference(model, loader(make_samples()), loss=loss, loss_reduction="sum")
    step = probe_interference(model, loader(make_samples()))
    for score in own.scores:
        torch.testing.assert_close(own.scores[score], step.scores[score], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"Attention has no `training_step`.*pass `loss="):
        probe_interference(model.attention, loader(make_samples()))


def test_one_loader_per_task_is_a_probe_too() -> None:
    model, samples = Model(), make_samples()
    joined = probe_interference(model, loader(samples[::2] + samples[1::2]))
    separate = probe_interference(model, [loader(samples[::2]), loader(samples[1::2])])
    assert same(joined, separate)


def test_a_compiled_model_is_measured_eagerly() -> None:
    model = Model().eval()
    expected = probe_interference(model, loader(make_samples()))
    model.attention.compile(backend="eager")
    model.predict(torch.randn(4, 5, WIDTH))
    assert same(probe_interference(model, loader(make_samples())), expected)


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        (lambda: loader(make_samples(), shuffle=True), r"at random \(RandomSampler\).*shuffle=False"),
        (list, "The probe holds no batch"),
        (lambda: loader([*make_samples(), make_samples()[2]]), "Sample 's2' of task 'code' is in the probe 2 times"),
        (lambda: loader([{**one, "y": torch.tensor(torch.nan)} for one in make_samples()]), "batch 0 of the probe is nan"),
    ],
)  # fmt: skip
def test_a_probe_that_is_none_is_refused(probe: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe_interference(Model(), probe())


def test_a_loss_without_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="loss of batch 0 of the probe has no gradient"):
        probe_interference(Model(), loader(make_samples()), loss=lambda model, batch: torch.ones(()))
    with pytest.raises(ValueError, match="No attention projection took part in the loss of batch 0"):
        probe_interference(Model(), loader(make_samples()), loss=lambda model, batch: model.head.weight.sum())


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return loader(make_samples(16, seed=1))

    def val_dataloader(self) -> DataLoader:
        return loader(make_samples(8, seed=2))

    def probe_dataloader(self) -> DataLoader:
        return loader(make_samples(16, seed=3))


def fit(
    tmp_path: Path, *callbacks: object, epochs: int = 2, model: Model | None = None
) -> tuple[Model, Trainer]:
    torch.manual_seed(0)
    model = model or Model()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
    )
    trainer.fit(model, Data())
    return model, trainer


@pytest.mark.parametrize("probe", ["probe_dataloader", None])
def test_the_monitor_measures_its_probe_at_the_weights_of_the_moment(
    tmp_path: Path, probe: str | None
) -> None:
    monitor = InterferenceMonitor(probe=probe or Data().probe_dataloader())
    model, _ = fit(tmp_path, monitor)
    # The direction of the trainer's own optimiser.
    expected = probe_interference(model, Data().probe_dataloader(), settings=ScoreSettings(update="sgd"))
    assert monitor.heatmap is not None
    assert monitor.heatmap.samples_per_task == {"code": 8, "math": 8}
    for score in expected.scores:
        assert torch.equal(monitor.heatmap.scores[score].nan_to_num(), expected.scores[score].nan_to_num())


def test_the_monitor_takes_the_loss_of_a_module_that_steps_by_itself(tmp_path: Path) -> None:
    """With manual optimisation ``training_step`` runs the optimiser: it cannot be the probe's loss."""

    class Manual(Model):
        automatic_optimization = False

        def training_step(self, batch: dict, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward((self.predict(batch["x"]) - batch["y"]).square().mean())
            optimizer.step()

    def loss(model: Model, batch: dict) -> torch.Tensor:
        return (model.predict(batch["x"]) - batch["y"]).square().mean()

    monitor = InterferenceMonitor(probe="probe_dataloader", probe_loss=loss)
    model, _ = fit(tmp_path, monitor, model=Manual())
    expected = probe_interference(model, Data().probe_dataloader(), loss=loss)
    assert monitor.heatmap is not None
    assert torch.equal(monitor.heatmap.scores["relative"], expected.scores["relative"])
    with pytest.raises(ValueError, match="Manual has no `training_step` that returns a loss"):
        fit(tmp_path, InterferenceMonitor(probe="probe_dataloader"), model=Manual())


def test_training_is_bit_identical_with_and_without_a_probe(tmp_path: Path) -> None:
    with_probe, with_trainer = fit(tmp_path / "a", InterferenceMonitor(probe="probe_dataloader"))
    without, without_trainer = fit(tmp_path / "b")
    for one, other in zip(with_probe.state_dict().values(), without.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    logged = {k: v for k, v in with_trainer.logged_metrics.items() if not k.startswith("interference/")}
    assert logged == without_trainer.logged_metrics
    assert with_probe.history == without.history


def test_a_hook_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No method `probes` in Data, Model"):
        fit(tmp_path, InterferenceMonitor(probe="probes"))


def test_the_head_map_can_be_given(tmp_path: Path) -> None:
    model = Model()
    only_queries = [p for p in find_projections(model) if p.block == "Q"]
    heatmap = probe_interference(model, loader(make_samples()), projections=only_queries)
    assert set(heatmap.layers[0].blocks) == {"Q"}
