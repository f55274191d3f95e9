"""The proof must hold for right maps and fail for wrong ones, by a measurement of its own."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModel

from qkov_lightning import Projection, find_projections, verify_projections

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
BATCH = {"input_ids": torch.tensor([[3, 14, 15, 9, 26, 5, 35], [8, 9, 7, 9, 32, 38, 4]])}


def build(family: str, **settings: Any) -> nn.Module:
    config = AutoConfig.for_model(family, **{**SIZES, **settings})
    return AutoModel.from_config(config, attn_implementation="sdpa").eval()


def llama() -> nn.Module:
    return build("llama", num_key_value_heads=2)


def gpt2() -> nn.Module:
    return build("gpt2", n_embd=32, n_layer=2, n_head=4)


def gpt_neox() -> nn.Module:
    return build("gpt_neox")


def olmo2() -> nn.Module:
    """A normalisation over all heads follows Q and K."""
    return build("olmo2", num_key_value_heads=2)


Change = Callable[[Projection], Tensor]


def changed(projections: list[Projection], block: str, features: Change) -> list[Projection]:
    return [dataclasses.replace(p, head_features=features(p)) if p.block == block else p for p in projections]


def renamed(projections: list[Projection], blocks: dict[str, str]) -> list[Projection]:
    """The map with the places of blocks exchanged."""
    places = {(p.layer, p.block): p for p in projections}
    return [
        dataclasses.replace(
            p,
            head_features=places[p.layer, blocks.get(p.block, p.block)].head_features,
            module_name=places[p.layer, blocks.get(p.block, p.block)].module_name,
        )
        for p in projections
    ]


def failing_blocks(model: nn.Module, projections: list[Projection]) -> set[str]:
    return {cell.projection.block for cell in verify_projections(model, BATCH, projections).failures}


class Operands(TorchFunctionMode):
    """Query, key and value of each fused attention call, and in place of its result a chosen one."""

    def __init__(self, kept_context: list[Tensor] | None = None) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self.contexts: list[Tensor] = []
        self.kept_context = kept_context

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is functional.scaled_dot_product_attention:
            self.seen.append(args[:3])
            self.contexts.append(result)
            if self.kept_context is not None:
                return self.kept_context[len(self.seen) - 1]
        return result


def operands(model: nn.Module, kept_context: list[Tensor] | None = None) -> tuple[Operands, Tensor]:
    with torch.no_grad(), Operands(kept_context) as watched:
        output = model(**BATCH)[0]
    return watched, output


def sum_keeping_rotation(size: int) -> Tensor:
    """Orthogonal, and leaves the vector of ones where it is."""
    direction = torch.randn(size)
    direction -= direction.mean()
    direction /= direction.norm()
    return torch.eye(size) - 2 * torch.outer(direction, direction)


def weight_of(model: nn.Module, projection: Projection) -> Tensor:
    """The weight with output features first, sharing memory with the model."""
    module = model.get_submodule(projection.module_name)
    return module.weight.data.T if type(module).__name__ == "Conv1D" else module.weight.data


@pytest.mark.parametrize("make", [llama, gpt2, gpt_neox, olmo2])
def test_changing_the_weights_of_a_slice_changes_the_operand_of_its_head_alone(
    make: Callable[[], nn.Module],
) -> None:
    """Finite changes of real weights, watched at the fused attention call.

    Independent of the proof's engine.
    """
    model = make()
    before, _ = operands(model)
    for projection in find_projections(model):
        if projection.block == "O":
            continue
        which = "QKV".index(projection.block)
        for head, features in enumerate(projection.head_features):
            weight = weight_of(model, projection)
            kept = weight.clone()
            weight[features] = sum_keeping_rotation(len(features)) @ weight[features]
            after, _ = operands(model)
            weight.copy_(kept)
            old, new = before.seen[projection.layer], after.seen[projection.layer]
            for operand in range(3):
                moved = (new[operand] - old[operand]).abs().amax(dim=(0, 2, 3)) > 1e-4
                heads = moved.nonzero().flatten().tolist()
                # Operands may be expanded to the query heads or not.
                group = projection.query_group if len(moved) > projection.num_heads else 1
                expected = list(range(head * group, (head + 1) * group)) if operand == which else []
                assert heads == expected, f"{projection.layer_name} {projection.block} {head} moved {heads}"


@pytest.mark.parametrize("make", [llama, gpt2, gpt_neox])
def test_output_columns_of_a_head_act_only_through_its_context(make: Callable[[], nn.Module]) -> None:
    model = make()
    contexts = operands(model)[0].contexts
    for projection in (p for p in find_projections(model) if p.block == "O"):
        for head, features in enumerate(projection.head_features):
            without = [c.clone() for c in contexts]
            without[projection.layer][:, head] = 0
            only = [c.clone() for c in contexts]
            only[projection.layer].zero_()[:, head] = contexts[projection.layer][:, head]
            weight = weight_of(model, projection)
            before = [operands(model, kept)[1] for kept in (without, only)]
            kept_weight = weight.clone()
            weight[:, features] += torch.randn(len(weight), len(features))
            after = [operands(model, kept)[1] for kept in (without, only)]
            weight.copy_(kept_weight)
            assert torch.equal(before[0], after[0])
            assert not torch.allclose(before[1], after[1], atol=1e-3)


@pytest.mark.parametrize("make", [llama, gpt2, gpt_neox, olmo2])
def test_right_maps_pass_in_every_cell(make: Callable[[], nn.Module]) -> None:
    model = make()
    verification = verify_projections(model, BATCH)
    assert verification.passed, str(verification)
    assert len(verification.cells) == sum(p.num_heads for p in find_projections(model))


@pytest.mark.parametrize("make", [llama, gpt2, gpt_neox, olmo2])
@pytest.mark.parametrize("block", ["Q", "K", "V", "O"])
def test_swapped_heads_fail_and_the_head_that_moved_is_named(
    make: Callable[[], nn.Module], block: str
) -> None:
    model = make()
    wrong = changed(find_projections(model), block, lambda p: p.head_features.flip(0))
    verification = verify_projections(model, BATCH, wrong)
    assert {cell.projection.block for cell in verification.failures} == {block}
    first = verification.failures[0]
    last = first.projection.num_heads - 1
    group = first.projection.query_group
    moved = ", ".join(str(h) for h in range(last * group, (last + 1) * group))
    assert f"head{'s' if group > 1 else ''} {moved} instead of head" in str(first)


@pytest.mark.parametrize("make", [llama, gpt2, gpt_neox])
@pytest.mark.parametrize("block", ["Q", "K", "V", "O"])
def test_wrong_interleaving_fails(make: Callable[[], nn.Module], block: str) -> None:
    """Feature by feature across the heads instead of head by head."""
    model = make()
    wrong = changed(
        find_projections(model),
        block,
        lambda p: p.head_features.sort().values.flatten().view(p.head_dim, p.num_heads).T.contiguous(),
    )
    assert failing_blocks(model, wrong) == {block}


@pytest.mark.parametrize("make", [llama, gpt2, gpt_neox])
@pytest.mark.parametrize("pair", ["QK", "QV", "KV"])
def test_exchanged_blocks_fail(make: Callable[[], nn.Module], pair: str) -> None:
    """Q and K enter the scores alike: only which tokens they act at tells them apart."""
    model = make()
    wrong = renamed(find_projections(model), {pair[0]: pair[1], pair[1]: pair[0]})
    assert set(pair) <= failing_blocks(model, wrong)


@pytest.mark.parametrize("block", ["Q", "K", "V", "O"])
def test_a_slice_that_stops_short_fails(block: str) -> None:
    model = gpt2()
    wrong = changed(find_projections(model), block, lambda p: p.head_features[:, :-1])
    failures = [c for c in verify_projections(model, BATCH, wrong).failures if c.projection.block == block]
    assert len(failures) == 8
    assert f"features outside the slice {'carry the head' if block == 'O' else 'act on the head'} too" in str(
        failures[0]
    )


def test_layout_of_another_convention_fails() -> None:
    """GPT-2 blocks read as GPT-NeoX groups: every shape agrees, most slices are wrong."""
    fused, blocks = gpt_neox(), gpt2()
    places = {(p.layer, p.block): p.head_features for p in find_projections(fused)}
    wrong = [dataclasses.replace(p, head_features=places[p.layer, p.block]) for p in find_projections(blocks)]
    assert failing_blocks(blocks, wrong) == {"Q", "K", "V"}


def test_rows_of_the_output_weight_are_no_heads() -> None:
    """A wide value head: slicing O by its rows would claim the wrong features of its input."""
    model = build("llama", num_key_value_heads=2, head_dim=12)
    wrong = changed(find_projections(model), "O", lambda p: torch.arange(32).view(4, 8))
    assert failing_blocks(model, wrong) == {"O"}


class Gated(nn.Module):
    """Attention whose query projection carries a gate beside each head."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16)
        self.o_proj = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        query, gate = self.q_proj(x).unflatten(-1, (4, 8)).chunk(2, dim=-1)
        key, value = (p(x).unflatten(-1, (4, 4)) for p in (self.k_proj, self.v_proj))
        context = functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)))
        return self.o_proj((context.transpose(1, 2) * gate.sigmoid()).flatten(-2))


def gated_map(query: Tensor) -> list[Projection]:
    from qkov_lightning import contiguous_heads

    heads = {"Q": query, **dict.fromkeys("KVO", contiguous_heads(4, 4))}
    names = {"Q": "q_proj", "K": "k_proj", "V": "v_proj", "O": "o_proj"}
    return [Projection(names[block], 0, "attention", block, features) for block, features in heads.items()]


def test_a_gate_inside_a_claimed_slice_is_found_out() -> None:
    model, x = Gated(), torch.randn(2, 5, 16)
    pieces = torch.arange(32).view(4, 8)
    assert verify_projections(model, x, gated_map(pieces[:, :4])).passed
    too_much = verify_projections(model, x, gated_map(pieces))
    assert "4 of its 8 features do not act on the head" in str(too_much)
    gates = verify_projections(model, x, gated_map(pieces[:, 4:]))
    assert {cell.projection.block for cell in gates.failures} == {"Q"}


class Linear(nn.Module):
    """Attention without a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.q_proj(x) * (self.k_proj(x) * self.v_proj(x)).cumsum(1))


def test_attention_without_a_softmax_is_not_proven() -> None:
    verification = verify_projections(Linear(), torch.randn(2, 5, 16), gated_map(torch.arange(16).view(4, 4)))
    assert len(verification.failures) == 16
    assert "not seen: the layer did not run, or not as softmax attention" in str(verification)


def test_the_model_is_left_as_found_even_after_an_error() -> None:
    model = llama().train()
    next(model.parameters()).requires_grad_(False)
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    verify_projections(model, BATCH)
    with pytest.raises(TypeError):
        verify_projections(model, {"no_such_argument": 1, "input_ids": object()})
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("find", [verify_projections, lambda model, batch, _: find_projections(model, batch)])
def test_nothing_of_the_graph_outlives_a_check(find: Callable[..., Any]) -> None:
    def computed() -> int:
        gc.collect()
        return sum(type(one) is Tensor and one.grad_fn is not None for one in gc.get_objects())

    model = llama()
    before = computed()
    find(model, BATCH, find_projections(model))
    assert computed() == before


def test_half_precision_does_not_blur_the_heads() -> None:
    assert verify_projections(olmo2().bfloat16(), BATCH).passed


def test_labels_for_the_monitor_are_kept_from_the_model() -> None:
    assert verify_projections(llama(), {**BATCH, "task": ["math", "code"], "sample_id": [1, 2]}).passed


def test_one_token_is_not_enough_to_tell_a_query_from_a_key() -> None:
    verification = verify_projections(llama(), {"input_ids": BATCH["input_ids"][:, :1]})
    assert len(verification.failures) == 24
    assert "over two tokens at least" in str(verification)


def test_a_normalisation_between_the_heads_and_the_output_projection_carries_nothing_over() -> None:
    assert verify_projections(build("bitnet", num_key_value_heads=2), BATCH).passed


class Masked(Gated):
    """The values of all heads decide which tokens are looked at."""

    def forward(self, x: Tensor) -> Tensor:
        parts = (p(x).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = parts
        mask = value.sum(dim=(1, 3))[:, None, None].expand(-1, 4, x.shape[1], -1)
        context = functional.scaled_dot_product_attention(query[..., :4], key, value, attn_mask=mask)
        return self.o_proj(context.transpose(1, 2).flatten(-2))


def test_values_that_act_on_the_scores_are_found_out() -> None:
    claimed = gated_map(torch.arange(32).view(4, 8)[:, :4])
    failures = verify_projections(Masked(), torch.randn(2, 5, 16), claimed).failures
    assert {(cell.projection.block, cell.problem) for cell in failures} == {
        ("V", "acts on the attention scores too")
    }


class Normalised(Gated):
    """A layer normalisation over all heads before the output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        parts = (p(x).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = parts
        context = functional.scaled_dot_product_attention(query[..., :4], key, value)
        return self.o_proj(self.norm(context.transpose(1, 2).flatten(-2)))


def test_a_layer_normalisation_before_the_output_projection_carries_nothing_over() -> None:
    """The mean of the heads must not move either."""
    model, x = Normalised(), torch.randn(2, 5, 16)
    right = gated_map(torch.arange(32).view(4, 8)[:, :4])
    assert verify_projections(model, x, right).passed
    wrong = changed(right, "O", lambda p: p.head_features.T.contiguous())
    failures = verify_projections(model, x, wrong).failures
    assert [(cell.projection.block, cell.head) for cell in failures] == [("O", head) for head in range(4)]


def test_a_layer_that_runs_several_times_is_checked_each_time() -> None:
    model = build("albert", embedding_size=16)
    verification = verify_projections(model, BATCH)
    assert verification.passed
    assert len(verification.cells) == 16
