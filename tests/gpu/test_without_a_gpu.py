"""On a processor that plays a GPU: the same numbers, nothing mixed, and no wait but these."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CausalSelfAttention, Classifier, GroupedAttention
from modules import loader
from simulated_device import DEVICE, SimulatedDevice
from torch import Tensor, nn
from torch.nn import functional

from qkov_lightning import (
    GradientCapture,
    find_projections,
    head_interference,
    measure_subspace,
    permutation_test,
    probe_interference,
    task,
)
from qkov_lightning.capture import reading
from qkov_lightning.capture.factors import CapturedStep
from qkov_lightning.capture.samples import Labels, read_labels
from qkov_lightning.heads.projected import ProjectedWeight, SubspaceRule
from qkov_lightning.heads.slices import FrozenSlice
from qkov_lightning.measure.recording import Recording
from qkov_lightning.store import streaming, sum_memory
from qkov_lightning.store.fitting import Budget
from qkov_lightning.store.sampling import Coordinates
from qkov_lightning.store.sums import RunningSums

WAITS = {
    "reading.read_together": "how the loss joins the samples, and which tokens have a gradient: once each",
    "recording.<lambda>": "what the gradient scaler had multiplied the loss with: known on the device alone",
    "batches._rows": "fingerprints of samples without an identifier",
    "batches.target_counts": "target tokens, where the loss does not show how it joins the samples",
    "samples._as_list": "tasks and identifiers that are tensors of the device",
    "samples.label_samples": "whether every packed token belongs to a listed sample",
    "joinings._per_sample": "which sample a packed token of the loss belongs to",
    "factors.token_orders": "which sample a packed token belongs to",
}
"""Where a captured step waits for the device, all of them when the step ends; and what for."""

TOKENS = torch.arange(20).view(4, 5) % 11
TARGETS = torch.arange(4)


def network(kind: str = "grouped", num_layers: int = 2) -> Classifier:
    torch.manual_seed(3)
    attention = {"grouped": GroupedAttention, "packed": lambda: CausalSelfAttention(conv=False)}[kind]
    return Classifier([attention() for _ in range(num_layers)], width=10 if kind == "grouped" else 12)


def padded(model: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    """A mean over tokens, of 1 to 4 in each sample, the rest of which is padding."""
    lengths = 1 + targets[:, None] % 4
    mask = torch.arange(5, device=tokens.device) < lengths
    x = model.embedding(tokens)
    for layer in model.layers:
        x = torch.tanh(x + layer(x, mask))
    labels = tokens.clamp(max=4).masked_fill(~mask, -100)
    return functional.cross_entropy(model.head(x).flatten(0, 1), labels.flatten())


def pooled(model: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(model(tokens), targets)


def named(tokens: Tensor) -> Labels:
    return read_labels(
        {"tokens": tokens, "task": ["a", "b"] * 2, "sample_id": list("wxyz")}, "task", "sample_id", "n"
    )


def unnamed(tokens: Tensor) -> Labels:
    return read_labels({"tokens": tokens, "task": "a"}, "task", "sample_id", "n")


def as_tensors(tokens: Tensor) -> Labels:
    numbers = torch.arange(4, device=tokens.device)
    return read_labels({"task": numbers % 2, "sample_id": numbers}, "task", "sample_id", "n")


def captured(
    where: torch.device,
    labels: Callable[[Tensor], Labels],
    loss: Callable[..., Tensor] = pooled,
    kind: str = "grouped",
    before_the_end: Callable[[], None] = lambda: None,
) -> CapturedStep:
    model, tokens, targets = network(kind).to(where), TOKENS.to(where), TARGETS.to(where)
    with GradientCapture(model, find_projections(model)) as capture:
        capture.start()
        value = loss(model, tokens, targets)
        capture.note_loss(value)
        value.backward()
        before_the_end()
        (step,) = capture.finish(lambda: labels(tokens))
    return step


@pytest.mark.parametrize("labels", [named, unnamed, as_tensors])
@pytest.mark.parametrize(("loss", "kind"), [(pooled, "grouped"), (padded, "grouped"), (pooled, "packed")])
def test_a_captured_step_is_that_of_the_processor_and_waits_only_when_it_ends(
    labels: Callable[[Tensor], Labels], loss: Callable[..., Tensor], kind: str
) -> None:
    expected = captured(torch.device("cpu"), labels, loss, kind)
    with SimulatedDevice() as device:
        found = captured(DEVICE, labels, loss, kind, before_the_end=lambda: device.expect({}))
        device.expect(WAITS, {"reading.read_together": 2})
        for name, factors in expected.factors.items():
            assert found.factors[name].activation.device == DEVICE
            torch.testing.assert_close(found.factors[name].activation.cpu(), factors.activation)
            # Not to the last bit: the attention of PyTorch takes another kernel on each device.
            torch.testing.assert_close(found.factors[name].grad_output.cpu(), factors.grad_output)
            assert torch.equal(found.factors[name].offsets, factors.offsets)
        assert found.samples == expected.samples
        assert torch.equal(found.scales, expected.scales)
        assert torch.equal(found.num_terms, expected.num_terms)


def test_packed_samples_wait_for_their_tokens_too() -> None:
    """One row of two samples, with padding between them."""
    samples = torch.tensor([[0] * 6 + [-1] * 3 + [1] * 11])

    def step(where: torch.device) -> CapturedStep:
        model, tokens = network().to(where), TOKENS.view(1, 20).to(where)
        with GradientCapture(model, find_projections(model), "sum") as capture:
            capture.start()
            with task(["a", "b"], token_samples=samples.to(where)):
                loss = model(tokens).square().sum()
            capture.note_loss(loss)
            loss.backward()
            (captured,) = capture.finish()
        return captured

    expected = step(torch.device("cpu"))
    with SimulatedDevice() as device:
        found = step(DEVICE)
        device.expect(WAITS)
        for name, factors in expected.factors.items():
            assert torch.equal(found.factors[name].grad_output.cpu(), factors.grad_output)
            assert found.factors[name].offsets.tolist() == [0, 6, 17]


def test_a_loss_that_selects_by_a_mask_waits_as_its_own_passes_do() -> None:
    """Which rows a mask selects is asked for by the model, too, forward and backward."""
    with SimulatedDevice() as device:
        model, tokens, targets = network().to(DEVICE), TOKENS.to(DEVICE), TARGETS.to(DEVICE)
        with GradientCapture(model, find_projections(model)) as capture:
            capture.start()
            mask = targets != 2
            loss = functional.cross_entropy(model(tokens)[mask], targets[mask])
            capture.note_loss(loss)
            device.expect(
                {"loss_terms._backward": "the rows that the mask selects"}, {"loss_terms._backward": 2}
            )
            loss.backward()
            (step,) = capture.finish(lambda: named(tokens))
        assert step.num_terms.tolist() == [1, 1, 1, 1]
        assert step.scales.tolist() == [3, 3, 0, 3]


class Scaler:
    """Multiplies with a number that only the device knows."""

    def __init__(self, device: torch.device) -> None:
        self._scale = torch.tensor(1024.0, device=device)

    def scale(self, value: Tensor) -> Tensor:
        return value * self._scale


def test_the_scale_of_a_gradient_scaler_is_asked_for_when_the_step_ends() -> None:
    with SimulatedDevice() as device:
        model, tokens, targets = network().to(DEVICE), TOKENS.to(DEVICE), TARGETS.to(DEVICE)
        recording, scaler = Recording("factors", Budget(4, 2**20, 2**20)), Scaler(DEVICE)
        recording.capture = GradientCapture(model, find_projections(model))
        recording.start(every_n_steps=1)
        loss = scaler.scale(pooled(model, tokens, targets)) / 2
        device.waits.clear()  # making the scaler is no part of the step
        recording.note_loss(loss, accumulated=2, scaler=scaler)
        loss.backward()
        device.expect({})
        (step,) = recording.capture.finish(lambda: named(tokens))
        device.expect(WAITS, {"recording.<lambda>": 1})
        assert step.scales.tolist() == [4 * 2 / 1024] * 4


def test_frozen_and_projected_weights_wait_for_nothing_in_a_step() -> None:
    def steps(where: torch.device, before_each: Callable[[int], None] = lambda _: None) -> list[Tensor]:
        torch.manual_seed(0)
        query, output, bias = (nn.Parameter(torch.randn(size).to(where)) for size in ((8, 6), (5, 8), (8,)))
        x, heads = torch.randn(3, 6).to(where), torch.arange(8).view(2, 4)
        directions = torch.linalg.qr(torch.randn(3, 6, 2))[0]
        projected = [
            ProjectedWeight("query", query, 1, [SubspaceRule(heads[:1], None, directions[:1])]),
            ProjectedWeight("output", output, 1, [SubspaceRule(None, heads, directions[1:, :4])]),
        ]
        frozen = [FrozenSlice(query, 0, [4, 5]), FrozenSlice(bias, 0, [1])]
        optimizer = torch.optim.AdamW([query, output, bias], lr=0.1)
        for step in range(3):
            before_each(step)
            (torch.tanh(x @ query.T + bias) @ output.T).square().sum().backward()
            for slice_ in frozen:
                slice_.remember()
                slice_.remove_gradient()
            for weight in projected:
                weight.remember()
            optimizer.step()
            for weight in projected:
                weight.project()
            for slice_ in frozen:
                slice_.put_back()
                slice_.forget()
            optimizer.zero_grad()
        return [query.detach(), output.detach(), bias.detach(), *(one for p in projected for one in p.taken)]

    expected = steps(torch.device("cpu"))
    with SimulatedDevice() as device:
        # The first step takes the indices to the device.
        found = steps(DEVICE, before_each=lambda step: device.waits.clear() if step == 1 else None)
        device.expect({})
        for there, here in zip(found, expected, strict=True):
            assert torch.equal(there.cpu(), here)


@pytest.mark.parametrize("has_float64", [True, False])
def test_a_probe_is_that_of_the_processor(has_float64: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without float64, as that of Apple, leaves the sums to the processor."""
    monkeypatch.setattr(streaming, "ahead", iter)  # a thread would not see the simulated device
    monkeypatch.setattr(reading, "WITHOUT_FLOAT64", frozenset() if has_float64 else frozenset({DEVICE.type}))

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return functional.cross_entropy(model(batch["tokens"]), batch["target"])

    expected = probe_interference(network(num_layers=1), loader(4), loss=loss)
    with SimulatedDevice(has_float64):
        found = probe_interference(network(num_layers=1).to(DEVICE), loader(4), loss=loss, verify="off")
    for score, values in expected.scores.items():
        torch.testing.assert_close(found.scores[score], values, equal_nan=True)
        torch.testing.assert_close(
            found.standard_errors[score], expected.standard_errors[score], equal_nan=True
        )


@pytest.mark.parametrize("has_float64", [True, False])
def test_a_subspace_is_that_of_the_processor(has_float64: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WITHOUT_FLOAT64", frozenset() if has_float64 else frozenset({DEVICE.type}))

    def run(model: Any, batch: dict[str, Any]) -> Tensor:
        return model(batch["tokens"]).sum()

    expected = measure_subspace(network(), loader(8), loss=run)
    with SimulatedDevice(has_float64):
        found = measure_subspace(network().to(DEVICE), loader(8), loss=run)
    for name, basis in expected.bases.items():
        torch.testing.assert_close(found.bases[name], basis)


@pytest.mark.parametrize("has_room", [True, False])
def test_sums_are_those_of_the_processor(
    has_room: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without room on the device, each block is summed there and added to the sums of the processor."""
    monkeypatch.setattr(sum_memory, "free_bytes", lambda _: 2**40 if has_room else 0)
    on_processor, projections = captured(torch.device("cpu"), named), find_projections(network())

    def summed(step: CapturedStep) -> RunningSums:
        coordinates = Coordinates.draw([on_processor], projections)
        running = RunningSums(tmp_path, 0, 1, projections, coordinates, 8, 2**30, 2**30)
        for number in range(2):
            running.add(number, [step])
        return running

    expected = summed(on_processor)
    with SimulatedDevice():
        found = summed(captured(DEVICE, named))
        for task_name in ("a", "b"):
            for name in ("layer 0 Q", "layer 1 O"):
                here, there = expected.in_memory(task_name, name), found.in_memory(task_name, name)
                assert here is not None
                assert there is not None
                assert there.device == (DEVICE if has_room else torch.device("cpu"))
                torch.testing.assert_close(there.cpu(), here)
        found.close(keep=True)
        assert found.in_memory("a", "layer 0 Q") is None


def test_the_functions_take_tensors_of_the_device() -> None:
    x = torch.randn(12, 2, 40, dtype=torch.float64)
    tasks, fisher, is_a = ["a", "b"] * 6, x.square().mean(dim=0), torch.arange(12) % 2 == 0
    shares = torch.full((12,), 1 / 12, dtype=torch.float64)
    expected = head_interference(x, tasks, fisher, fisher_shares=shares)["a", "b"]
    with SimulatedDevice():
        away = x.to(DEVICE)
        found = head_interference(away, tasks, fisher.to(DEVICE), fisher_shares=shares.to(DEVICE))["a", "b"]
        for name, values in expected.items():
            torch.testing.assert_close(found[name].cpu(), values)
        p_value = permutation_test(away, is_a).p_value
    torch.testing.assert_close(p_value, permutation_test(x, is_a).p_value)


def test_the_simulated_device_refuses_what_a_real_one_would() -> None:
    with SimulatedDevice() as device:
        away = torch.ones(3, device=DEVICE)
        assert away.device == DEVICE
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            away + torch.ones(3)
        assert float((away * torch.tensor(2.0)).sum()) == 6  # a number of the processor may be mixed in
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            away.index_select(0, torch.tensor([0]))
    with SimulatedDevice(has_float64=False), pytest.raises(TypeError, match="has no float64"):
        torch.ones(3, device=DEVICE).double()
    assert device.waits == []  # none of them in the package


def test_every_wait_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of waits that holds what never happens would hide what does."""
    seen: set[str] = set()
    monkeypatch.setattr(
        SimulatedDevice, "expect", lambda self, *_: seen.update(caller for caller, _ in self.waits)
    )
    for labels in (named, unnamed, as_tensors):
        test_a_captured_step_is_that_of_the_processor_and_waits_only_when_it_ends(labels, padded, "grouped")
    test_packed_samples_wait_for_their_tokens_too()
    test_the_scale_of_a_gradient_scaler_is_asked_for_when_the_step_ends()
    assert set(WAITS) - seen == {"batches.target_counts"}
    assert not seen - set(WAITS)
