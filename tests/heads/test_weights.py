"""Weights by head: the order of the gradients, and what an optimiser multiplies them with."""

from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError
from models import CausalSelfAttention, Classifier, GroupedAttention
from modules import Module, loader, trainer
from test_monitor import assert_heatmap_is

from qkov_lightning import EmpiricalFisher, InterferenceMonitor, find_projections, head_interference
from qkov_lightning.capture.gradients import DenseGradients, head_gradients
from qkov_lightning.heads.weights import adaptive_rates, by_head, find_weight

pytestmark = pytest.mark.filterwarnings(
    # Advice of Lightning about the size of the test, not about the package.
    "ignore:.*does not have many workers.*",
    "ignore:.*smaller than the logging interval.*",
    "ignore:You defined a `validation_step` but have no `val_dataloader`.*",
    "ignore:Checkpoint directory .* exists and is not empty",
)


class WithAdam(Module):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01, betas=(0.8, 0.95), eps=1e-3)


@pytest.mark.parametrize("conv", [True, False], ids=["Conv1D", "Linear"])
def test_weights_have_the_order_of_the_gradients(conv: bool) -> None:
    model = Classifier([CausalSelfAttention(conv=conv)], width=12)
    for projection in find_projections(model):
        weight = find_weight(model, projection)
        values = model.get_parameter(weight.parameter_name).detach()
        outputs_first = values.T if conv else values
        expected = head_gradients(DenseGradients(outputs_first[None]), projection, torch.ones(1))[0]
        torch.testing.assert_close(by_head(values, projection, weight), expected)


def test_rates_are_those_by_which_adam_moved() -> None:
    """One more step of Adam without momentum moves every weight by the rate times the gradient."""
    module = Module()
    parameters = list(module.parameters())
    optimizer = torch.optim.Adam(parameters, 1e-3, betas=(0.0, 0.9), eps=1e-2)
    batch = next(iter(loader(4)))
    for _ in range(3):
        optimizer.zero_grad()
        module.loss(batch).backward()
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        optimizer.step()
    for projection in find_projections(module):
        weight = find_weight(module, projection)
        parameter = module.get_parameter(weight.parameter_name)
        moved = by_head((before[weight.parameter_name] - parameter).detach(), projection, weight)
        expected = (
            1e-3
            * adaptive_rates(module, projection, [optimizer])
            * by_head(parameter.grad, projection, weight)
        )
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-7)  # a difference of float32 weights


def test_the_monitor_takes_the_direction_from_the_optimiser_when_asked(tmp_path: Path) -> None:
    """Of the same captured gradients: the scores of one monitor from those of the other, and the rates."""
    module = WithAdam()
    state = InterferenceMonitor(
        every_n_steps=1, update_direction="state", step_size=0.1, keep_cache=True, name="state"
    )
    adam = InterferenceMonitor(every_n_steps=1, step_size=0.1, keep_cache=True, name="auto")
    sgd = InterferenceMonitor(
        every_n_steps=1, update_direction="sgd", step_size=0.1, keep_cache=True, name="sgd"
    )
    fit = trainer(tmp_path, state, adam, sgd)
    fit.fit(module, loader(24))
    expected = {}
    for monitor, update in ((adam, "adam"), (sgd, "sgd"), (state, None)):
        for projection in find_projections(module):
            gradients, names, steps = [], [], []
            fisher = EmpiricalFisher()
            for record, _ in monitor._recording.store.cache.records():
                part = head_gradients(record.read(projection.module_name), projection, record.scales)
                fisher.update(part, record.samples.tasks)
                gradients.append(part)
                names += record.samples.tasks
                steps += [record.step] * len(record.samples)
            rates = update or adaptive_rates(module, projection, fit.optimizers)
            scores = head_interference(
                torch.cat(gradients),
                names,
                fisher.pooled(),
                update=rates,
                step_size=0.1,
                fisher_shares=fisher.shares(names, steps),
            )
            expected |= {
                (projection.layer, projection.block, *pair): values for pair, values in scores.items()
            }
        assert_heatmap_is(monitor.heatmap, expected)
    one, other = (m.heatmap.values("math", "code", "loss_rise") for m in (state, sgd))
    assert not torch.allclose(one, other, rtol=0.1, equal_nan=True)


def test_an_optimiser_without_second_moments_is_refused(tmp_path: Path) -> None:
    monitor = InterferenceMonitor(every_n_steps=1, update_direction="state")
    with pytest.raises(
        ValueError, match=r"No optimiser \(SGD\) holds second moments .* of `network\.layers\.0\.q_proj"
    ):
        trainer(tmp_path, monitor).fit(Module(), loader(8))


def test_directions_that_do_not_exist_are_refused() -> None:
    for value in ("newton", ""):
        with pytest.raises((ValueError, TypeCheckError), match=f"update_direction.*{value}"):
            InterferenceMonitor(update_direction=value)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="update_direction is 'state', expected auto, adam or sgd with a probe"
    ):
        InterferenceMonitor(update_direction="state", probe="probe_dataloader")
    with pytest.raises(ValueError, match=r"step_size is 0\.0, expected a positive number"):
        InterferenceMonitor(step_size=0.0)


def test_head_sizes_that_are_not_width_over_heads() -> None:
    model = Classifier([GroupedAttention()], width=10)
    shapes = {p.block: by_head(torch.randn(12, 10) if p.block == "Q" else torch.randn(6, 10), p, find_weight(model, p)).shape
              for p in find_projections(model) if p.block in "QK"}  # fmt: skip
    assert shapes == {"Q": (4, 30), "K": (2, 30)}


def test_frozen_blocks_need_no_direction_from_the_optimiser(tmp_path: Path) -> None:
    module = WithAdam()
    for layer in module.network.layers:
        layer.k_proj.requires_grad_(False)
    monitor = InterferenceMonitor(every_n_steps=1, update_direction="state")
    trainer(tmp_path, monitor).fit(module, loader(24))
    assert monitor.heatmap.layers[0].blocks["K"].status == "frozen"
    assert not monitor.heatmap.values("math", "code", "loss_rise")[..., 0].isnan().all()
