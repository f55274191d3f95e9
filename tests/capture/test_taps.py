"""Captured factors give exactly the gradients that batch-of-one autograd gives."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from models import CausalSelfAttention, Classifier, Conv1D, GroupedAttention
from oracles import batch_of_one_gradients
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import qkov_lightning.capture.taps as capture_module
from qkov_lightning import CaptureWarning, GradientCapture, find_projections, task
from qkov_lightning.capture.factors import CapturedStep, GradientFactors
from qkov_lightning.capture.gradients import dense_gradients, head_gradients
from qkov_lightning.capture.samples import Samples, label_samples

# Float64 products of the same numbers in another order: a few units in the last place of the largest term.
EXACT = {"rtol": 1e-10, "atol": 1e-13}
TOKENS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [3, 3, 1, 0, 2], [5, 9, 0, 0, 1]])
TARGETS = torch.tensor([0, 1, 2, 3])
TASKS = ["math", "code", "math", "code"]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the projections, outputs first."""
    modules = {p.module_name: model.get_submodule(p.module_name) for p in find_projections(model)}
    return {name: module.weight for name, module in modules.items() if module.weight.requires_grad}


def outputs_first(model: nn.Module, name: str, gradient: Tensor) -> Tensor:
    return gradient.transpose(1, 2) if isinstance(model.get_submodule(name), Conv1D) else gradient


def assert_equals_autograd(
    model: nn.Module, step: CapturedStep, losses: Callable[[int], Tensor], num_samples: int = 4
) -> None:
    expected = batch_of_one_gradients(model, weights_of(model), losses, num_samples)
    assert set(step.factors) == set(expected)
    for name, factors in step.factors.items():
        found = dense_gradients(factors).gradient.double() * step.scales[:, None, None]
        torch.testing.assert_close(found, outputs_first(model, name, expected[name]), **EXACT)


def run(
    model: nn.Module,
    loss: Callable[[], Tensor],
    reduction: str = "mean",
    tasks: object = TASKS,
    **labels: object,
) -> list[CapturedStep]:
    with GradientCapture(model, find_projections(model), reduction) as capture:
        capture.start()
        loss().backward()
        return capture.finish(lambda: label_samples(tasks, **labels))


def grouped(layers: int = 2, **kwargs: object) -> Classifier:
    return Classifier([GroupedAttention(**kwargs) for _ in range(layers)], width=10).double()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "grouped-query, head size and value size of their own": grouped,
    "no bias": lambda: grouped(bias=False),
    "fused and transposed": lambda: Classifier([CausalSelfAttention() for _ in range(2)], width=12).double(),
    "fused linear": lambda: Classifier([CausalSelfAttention(conv=False)], width=12).double(),
    "one module in two places": lambda: Classifier([GroupedAttention()] * 2, width=10).double(),
}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_factors_equal_batch_of_one_autograd(build: Callable[[], nn.Module], reduction: str) -> None:
    model = build()
    (step,) = run(
        model, lambda: functional.cross_entropy(model(TOKENS), TARGETS, reduction=reduction), reduction
    )
    assert_equals_autograd(
        model, step, lambda n: functional.cross_entropy(model(TOKENS[n : n + 1]), TARGETS[n : n + 1])
    )


def test_a_token_mean_loss_is_undone_by_the_tokens_of_each_sample() -> None:
    model = grouped()
    model.head = nn.Linear(10, 11).double()
    labels = TOKENS.clone()
    labels[0, 1:] = labels[1, 3:] = -100  # samples of 1, 3, 5 and 5 target tokens

    def logits(tokens: Tensor) -> Tensor:
        x = model.embedding(tokens)
        for layer in model.layers:
            x = torch.tanh(x + layer(x))
        return model.head(x)

    def loss(rows: slice) -> Tensor:
        return functional.cross_entropy(logits(TOKENS[rows]).flatten(0, 1), labels[rows].flatten())

    counts = (labels != -100).sum(dim=1)
    (step,) = run(model, lambda: loss(slice(None)), "token_mean", num_target_tokens=counts)
    assert_equals_autograd(model, step, lambda n: loss(slice(n, n + 1)))


def test_a_token_mean_loss_without_counts_is_refused() -> None:
    model = grouped()
    with pytest.raises(ValueError, match=r'batch\["num_target_tokens"\]'):
        run(model, lambda: model(TOKENS).sum(), "token_mean")


def test_padding_is_dropped_and_nothing_is_lost() -> None:
    model = grouped()
    mask = torch.tensor([
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 0, 0, 0, 0],
        [0, 0, 1, 1, 1],
    ]).bool()  # right and left

    def loss(rows: slice) -> Tensor:
        return functional.cross_entropy(model(TOKENS[rows], mask[rows]), TARGETS[rows])

    (step,) = run(model, lambda: loss(slice(None)))
    assert_equals_autograd(model, step, lambda n: loss(slice(n, n + 1)))
    last = step.factors["layers.1.q_proj"]
    assert last.offsets.diff().tolist() == mask.sum(dim=1).tolist()
    assert last.activation is step.factors["layers.1.k_proj"].activation, "Q, K and V share their input"


def test_a_frozen_block_is_left_out_and_the_rest_is_exact() -> None:
    model = grouped()
    model.layers[0].k_proj.requires_grad_(False)
    (step,) = run(model, lambda: functional.cross_entropy(model(TOKENS), TARGETS))
    assert "layers.0.k_proj" not in step.factors
    assert_equals_autograd(
        model, step, lambda n: functional.cross_entropy(model(TOKENS[n : n + 1]), TARGETS[n : n + 1])
    )


def test_an_output_changed_in_place_is_captured_exactly() -> None:
    class Scaled(GroupedAttention):
        def forward(self, x: Tensor) -> Tensor:
            query = self.q_proj(x)
            query *= 0.5
            key = self.k_proj(x).repeat_interleave(2, -1)
            value = self.v_proj(x).repeat_interleave(2, -1)
            return self.o_proj((query @ key.transpose(1, 2)).softmax(-1) @ value)

    model = Classifier([Scaled()], width=10).double()
    (step,) = run(model, lambda: functional.cross_entropy(model(TOKENS), TARGETS))
    assert_equals_autograd(
        model, step, lambda n: functional.cross_entropy(model(TOKENS[n : n + 1]), TARGETS[n : n + 1])
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    class Checkpointed(Classifier):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            for layer in self.layers:
                x = torch.tanh(x + checkpoint(layer, x, use_reentrant=reentrant))
            return self.head(x.mean(dim=1))

    def plain(n: int) -> Tensor:  # autograd.grad does not see weights inside a reentrant checkpoint
        return functional.cross_entropy(Classifier.forward(model, TOKENS[n : n + 1]), TARGETS[n : n + 1])

    model = Checkpointed([GroupedAttention() for _ in range(2)], width=10).double()
    (step,) = run(model, lambda: functional.cross_entropy(model(TOKENS), TARGETS))
    assert_equals_autograd(model, step, plain)


def test_each_forward_inside_a_task_is_a_step_of_its_own() -> None:
    model = grouped()

    def loss() -> Tensor:
        with task("math", sample_ids=["a", "b", "c"]):
            first = functional.cross_entropy(model(TOKENS[:3]), TARGETS[:3])
        with task("code"):
            second = functional.cross_entropy(model(TOKENS[3:]), TARGETS[3:])
        return first + second

    math, code = run(model, loss, tasks=None)
    assert (math.samples.tasks, math.samples.ids) == (("math",) * 3, ("a", "b", "c"))
    assert (code.samples.tasks, code.samples.ids) == (("code",), ("#0",))
    assert_equals_autograd(
        model, math, lambda n: functional.cross_entropy(model(TOKENS[n : n + 1]), TARGETS[n : n + 1]), 3
    )
    assert_equals_autograd(model, code, lambda n: functional.cross_entropy(model(TOKENS[3:]), TARGETS[3:]), 1)


def test_several_backward_passes_with_scales_of_their_own_add_up() -> None:
    model = grouped()
    with GradientCapture(model, find_projections(model)) as capture:
        capture.start()
        scores = model(TOKENS)
        for scale in (1.0, 8.0):  # the second loss was divided by eight
            capture.scale = scale
            (functional.cross_entropy(scores, TARGETS) / scale).backward(retain_graph=True)
        (step,) = capture.finish(lambda: label_samples(TASKS))
    assert_equals_autograd(
        model, step, lambda n: 2 * functional.cross_entropy(model(TOKENS[n : n + 1]), TARGETS[n : n + 1])
    )


def test_heads_are_rows_of_q_k_v_and_columns_of_o() -> None:
    model = grouped(layers=1)
    (step,) = run(model, lambda: functional.cross_entropy(model(TOKENS), TARGETS))
    for projection in find_projections(model):
        heads = head_gradients(step.factors[projection.module_name], projection, step.scales)
        whole = dense_gradients(step.factors[projection.module_name]).gradient * step.scales[:, None, None]
        for head in range(projection.num_heads):
            rows = slice(head * projection.head_dim, (head + 1) * projection.head_dim)
            expected = whole[:, :, rows].transpose(1, 2) if projection.block == "O" else whole[:, rows]
            torch.testing.assert_close(heads[:, head], expected.flatten(1), **EXACT)
        torch.testing.assert_close(heads.square().sum(dim=(1, 2)), whole.square().sum(dim=(1, 2)), **EXACT)


def test_dense_and_factored_sources_give_the_same_head_gradients() -> None:
    model = Classifier([CausalSelfAttention()], width=12).double()
    (step,) = run(model, lambda: functional.cross_entropy(model(TOKENS), TARGETS))
    for projection in find_projections(model):
        factors = step.factors[projection.module_name]
        torch.testing.assert_close(
            head_gradients(factors, projection, step.scales),
            head_gradients(dense_gradients(factors), projection, step.scales),
            **EXACT,
        )


def test_training_is_not_touched_outside_of_a_step() -> None:
    model = grouped()
    with GradientCapture(model, find_projections(model)) as capture:
        assert model(TOKENS).grad_fn is not None
        capture.start()
        capture.discard()
        assert type(model.layers[0].q_proj(model.embedding(TOKENS)).grad_fn).__name__ != "_TapBackward"
    assert not any(module._forward_hooks for module in model.modules())


def test_outputs_and_gradients_are_bit_identical_with_taps() -> None:
    model = grouped().float()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        loss = functional.cross_entropy(model(TOKENS), TARGETS)
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    plain = gradients()
    with GradientCapture(model, find_projections(model)) as capture:
        capture.start()
        tapped = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, tapped, strict=True))


def test_taps_are_gone_after_an_exception() -> None:
    model = grouped()
    capture = GradientCapture(model, find_projections(model))
    with pytest.raises(ZeroDivisionError), capture:
        _ = 1 / 0
    assert not any(module._forward_hooks for module in model.modules())


def test_a_forward_that_never_reaches_the_loss_is_named_and_has_no_data() -> None:
    model = grouped()
    with GradientCapture(model, find_projections(model)) as capture:
        capture.start()
        model.layers[0](model.embedding(TOKENS))
        with pytest.warns(CaptureWarning, match=r"`layers.0.\w_proj`: it ran forward, but no gradient"):
            assert capture.finish(lambda: label_samples(TASKS)) == []


def test_a_gradient_without_a_forward_that_was_seen_is_named() -> None:
    class Functional(GroupedAttention):
        def forward(self, x: Tensor) -> Tensor:
            query = functional.linear(x, self.q_proj.weight, self.q_proj.bias)  # goes past the module
            key, value = self.k_proj(x).repeat_interleave(2, -1), self.v_proj(x).repeat_interleave(2, -1)
            return self.o_proj((query @ key.transpose(1, 2)).softmax(-1) @ value)

    model = Classifier([Functional()], width=10).double()
    with pytest.warns(
        CaptureWarning, match="`layers.0.q_proj`: it has a gradient, but its forward pass was not seen"
    ):
        (step,) = run(model, lambda: functional.cross_entropy(model(TOKENS), TARGETS))
    assert "layers.0.q_proj" not in step.factors
    assert "layers.0.k_proj" in step.factors


def test_a_gradient_of_a_gradient_is_refused_by_name() -> None:
    model = grouped(layers=1)

    def loss() -> Tensor:
        x = model.embedding(TOKENS)
        score = model.head(model.layers[0](x).mean(dim=1)).sum()
        (gradient,) = torch.autograd.grad(score, x, create_graph=True)
        return score + gradient.square().sum()

    with pytest.raises(ValueError, match="differentiated again"):
        run(model, loss)


def test_an_input_without_one_row_per_sample_is_refused() -> None:
    model = grouped(layers=1)
    with pytest.raises(ValueError, match=r"4 tasks .* have 1 rows: .* samples along the first dimension"):
        run(model, lambda: model.layers[0](model.embedding(TOKENS).flatten(0, 1)[None]).sum())


def test_samples_without_a_task_are_refused() -> None:
    model = grouped()
    with GradientCapture(model, find_projections(model)) as capture:
        capture.start()
        model(TOKENS).sum().backward()
        with pytest.raises(ValueError, match=r"have no task: wrap the forward pass in `with task"):
            capture.finish()


def test_too_few_tasks_are_refused() -> None:
    model = grouped()
    with pytest.raises(ValueError, match=r"3 tasks \(or sample ids\) were given, but .* have 4 rows"):
        run(model, lambda: model(TOKENS).sum(), tasks=TASKS[:3])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("field", ["activation", "grad_output"])
def test_one_value_that_is_not_finite_is_noticed(field: str, value: float) -> None:
    tensors = {"activation": torch.randn(6, 3), "grad_output": torch.randn(6, 2)}
    offsets = torch.tensor([0, 2, 6])

    def step() -> CapturedStep:
        samples = Samples(("math", "code"), ("0", "1"))
        return CapturedStep(
            samples, *torch.ones(2, 2), {"q_proj": GradientFactors(**tensors, offsets=offsets)}
        )

    assert step().is_finite
    tensors[field][4, 1] = value
    assert not step().is_finite
    tensors = {name: tensor[:0] for name, tensor in tensors.items()}  # every token was padding
    offsets = torch.zeros(3, dtype=torch.int64)
    assert step().is_finite


def test_factors_keep_their_values_when_the_model_overwrites_its_tensors() -> None:
    model = grouped(layers=1)
    hidden = model.embedding(TOKENS).detach()
    with GradientCapture(model, find_projections(model)) as capture:
        capture.start()
        model.layers[0](hidden).sum().backward()
        (step,) = capture.finish(lambda: label_samples(TASKS))
    before = {name: factors.activation.clone() for name, factors in step.factors.items()}
    hidden.zero_()
    assert all(torch.equal(step.factors[name].activation, tensor) for name, tensor in before.items())


def test_what_was_delivered_is_let_go_while_the_rest_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held until the end, it doubled the memory that a captured step needs."""
    join, seen, alive = capture_module.join, [], []

    def watched(modules: dict, *rest: object) -> object:
        seen.extend(weakref.ref(delivery) for own in modules.values() for delivery in own)
        alive.append(sum(reference() is not None for reference in seen))
        return join(modules, *rest)

    monkeypatch.setattr(capture_module, "join", watched)
    model = grouped(layers=3)
    run(model, lambda: functional.cross_entropy(model(TOKENS), TARGETS))
    assert alive == [3, 1] * 3  # layer by layer: what reads the input of Q, K and V, then O


def test_asking_for_the_edges_captures_without_a_gradient_of_any_weight() -> None:
    """And the backward pass ends at the lowest of the projections that are watched."""
    model = Classifier([GroupedAttention() for _ in range(3)], width=10).double()
    upper = [one for one in find_projections(model) if one.layer > 0]
    reached: list[int] = []
    for index, layer in enumerate(model.layers):
        layer.o_proj.register_full_backward_hook(lambda *_, index=index: reached.append(index))
    with GradientCapture(model, upper, "mean") as capture:
        capture.start()
        loss = functional.cross_entropy(model(TOKENS), TARGETS)
        assert len(capture.edges) == len(upper)
        torch.autograd.grad(loss, capture.edges)
        (step,) = capture.finish(lambda: label_samples(TASKS))
    assert reached == [2, 1]
    assert all(parameter.grad is None for parameter in model.parameters())
    expected = batch_of_one_gradients(
        model,
        weights_of(model),
        lambda i: functional.cross_entropy(model(TOKENS[i : i + 1]), TARGETS[i : i + 1]),
        4,
    )
    assert set(step.factors) == {one.module_name for one in upper}
    for name, factors in step.factors.items():
        found = dense_gradients(factors).gradient * step.scales[:, None, None]
        torch.testing.assert_close(found, expected[name], **EXACT)
