"""Which slice of features moves which head of one attention layer, from derivatives.

A slice is moved along infinitesimal rotations that keep its sum and its length. A normalisation over all
features depends on a slice only through these two, so that it does not carry the movement to other heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qkov_lightning.heads.maps import widened
from qkov_lightning.heads.projections import Block, Projection

NUM_ROTATIONS = 8
"""Random rotations along which each slice is moved."""

NUM_QUERIES = 6
"""Query tokens that are looked at one by one, at most."""

MASKED = 1e4
"""A score below minus this is the mask's."""

Derivatives = Sequence[tuple[Tensor, Tensor]]
"""For each call of a module: derivative of a head with respect to the module's output, and that output."""


def by_head(tensor: Tensor, num_heads: int) -> Float[Tensor, "sample head query key"] | None:
    """Attention scores with the axis of the heads made plain, or None if it cannot be told."""
    if tensor.ndim < 3:
        return None
    rows = tensor.shape[-2:]
    if tensor.ndim >= 4 and tensor.shape[-3] == num_heads:
        return tensor.reshape(-1, num_heads, *rows)
    if tensor.ndim >= 5 and tensor.shape[1:-2].numel() == num_heads:  # key-value heads x query heads of each
        return tensor.reshape(-1, num_heads, *rows)
    if tensor.ndim == 5 and tensor.shape[1] == num_heads:  # windows between heads and queries
        return tensor.transpose(1, 2).reshape(-1, num_heads, *rows)
    if tensor.ndim == 4 and tensor.shape[2] == num_heads:  # heads behind queries, as of sliding windows
        return tensor.transpose(1, 2)
    if tensor.ndim == 3 and tensor.shape[0] % num_heads == 0:  # samples and heads in one axis
        return tensor.reshape(-1, num_heads, *rows)
    return None


def tolerance(dtype: torch.dtype) -> float:
    """Share of the movement that may be rounding: the square root of the precision."""
    return float(torch.finfo(dtype).eps) ** 0.5


def slice_influence(
    derivatives: Derivatives,
    features: Int[Tensor, "slice feature"],
    possible_features: Int[Tensor, "other own"],
) -> Float[Tensor, " slice"]:
    """How much each slice moves the head, as a share of what the slices ``possible_features`` could."""
    moved = torch.zeros(len(features), dtype=torch.float64)
    possible = torch.zeros((), dtype=torch.float64)
    rotations = _rotations(features.shape[1])
    for derivative, output in derivatives:
        g, y = (t.detach().reshape(-1, t.shape[-1]).cpu().double() for t in (derivative, output))
        sizes = g[:, possible_features].square().sum(-1) * y[:, possible_features].square().sum(-1)
        possible += sizes.sum()
        g, y = g[:, features], y[:, features]
        if rotations is None:
            moved += (g * y).sum(-1).square().sum(0)
            continue
        (gu, gv), (yu, yv) = ((t @ rotations[0].T, t @ rotations[1].T) for t in (g, y))
        moved += (gu * yv - gv * yu).square().mean(-1).sum(0)
    return (moved / possible.clamp(min=torch.finfo(torch.float64).tiny)).sqrt()


@lru_cache(maxsize=64)
def _rotations(size: int) -> Float[Tensor, "2 rotation {size}"] | None:
    """Pairs of random directions that keep the sum; None below 3 features, where no rotation does."""
    if size < 3:
        return None
    generator = torch.Generator().manual_seed(size)
    directions = torch.randn(2, NUM_ROTATIONS, size, generator=generator, dtype=torch.float64)
    return directions - directions.mean(dim=-1, keepdim=True)


def acting_features(derivatives: Derivatives) -> Bool[Tensor, feature]:
    """Features that have any effect on the head."""
    return torch.stack([(g.detach() != 0).flatten(0, -2).any(0).cpu() for g, _ in derivatives]).any(0)


def acting_tokens(
    derivatives: Derivatives, features: Int[Tensor, "slice feature"]
) -> Int[Tensor, "call slice"]:
    """At how many tokens each slice acts, call by call."""
    return torch.stack([
        (g.detach().reshape(-1, g.shape[-1]).cpu()[:, features] != 0).any(-1).sum(0) for g, _ in derivatives
    ])


@dataclass(frozen=True, eq=False)
class Leaf:
    """Some output features of a linear map, cut out of the graph.

    Attributes:
        tensor: Its output.
        columns: Columns of the output.
        features: Which feature of the map each of them is.
        width: Features of the map.
    """

    tensor: Tensor
    columns: Int[Tensor, column]
    features: Int[Tensor, column]
    width: int

    @classmethod
    def whole(cls, tensor: Tensor) -> Leaf:
        """All features of a map."""
        features = torch.arange(tensor.shape[-1])
        return cls(tensor, features, features, len(features))

    def widened(self, tensor: Tensor) -> Tensor:
        """A tensor like the output, with a column for each feature of the map."""
        if tensor.shape[-1] == len(self.columns) == self.width and torch.equal(self.columns, self.features):
            return tensor
        own = tensor.index_select(-1, self.columns.to(tensor.device))
        return widened(own, self.features, self.width)


@dataclass(frozen=True, eq=False)
class AttentionGraph:
    """The computation of one attention layer, cut at its projections and at its softmax.

    Attributes:
        layer: The claims.
        num_heads: Query heads.
        outputs: Leaves of each map, by the name of its projection.
        scores: Input of the softmax, heads apart.
        probabilities: Its output; of each softmax, where every head has one of its own.
        weighted_values: What each of them was multiplied into.
        context: Input of the output projection; None where there is none.
        headed: Brings tensors of the shape of the probabilities into that of the scores.
    """

    layer: Mapping[Block, Projection]
    num_heads: int
    outputs: Mapping[str, list[Leaf]]
    scores: Float[Tensor, "sample head query key"]
    probabilities: Sequence[Tensor]
    weighted_values: Sequence[Tensor]
    context: Tensor | None
    headed: Callable[[Sequence[Tensor]], Tensor]

    def problems(self) -> dict[tuple[Block, int], str | None]:
        """What is wrong with each head of each block."""
        scores = self.scores
        values = self._values()
        one_query, one_value = [], []
        # Those with the largest scores: a token may be padding, or zero, or see one key under a causal mask.
        sizes = scores.detach().cpu().double().abs()
        strength = torch.where(sizes < MASKED, sizes, 0.0).sum(dim=(1, 3))
        for index in strength.flatten().topk(min(NUM_QUERIES, strength.numel())).indices.tolist():
            sample, token = divmod(index, strength.shape[1])
            cotangent = torch.zeros_like(scores)
            cotangent[sample, :, token].normal_()
            one_query.append((scores, cotangent))
            one_value.append((values, cotangent))
        found: dict[tuple[Block, int], str | None] = {}
        for block, projection in self.layer.items():
            problems: list[str | None] = [None] * projection.num_heads
            for role in (block, *projection.also):
                if role == "O":
                    own = [self._output_problem(projection, head) for head in range(projection.num_heads)]
                elif role == "V":
                    own = self._input_problems(projection, role, values, one_value)
                    if self._sways_scores(projection, scores):
                        own = [problem or "acts on the attention scores too" for problem in own]
                else:
                    own = self._input_problems(projection, role, scores, one_query)
                problems = [one or other for one, other in zip(problems, own, strict=True)]
            found.update({(block, head): problem for head, problem in enumerate(problems)})
        return found

    def _values(self) -> Tensor:
        """The values, as the softmax meets them: what each attention weight does to the weighted values."""
        found: list[Tensor] = []
        for weighted, probabilities in zip(self.weighted_values, self.probabilities, strict=True):
            direction = torch.randn_like(weighted)
            found += torch.autograd.grad(weighted, [probabilities], direction, create_graph=True)
        return self.headed(found)

    def _derivatives(self, projection: Projection, heads: Tensor, cotangent: Tensor) -> Derivatives:
        outputs = self.outputs.get(projection.module_name, [])
        if not outputs or not heads.requires_grad:
            return []
        leaves = [leaf.tensor for leaf in outputs]
        gradients = torch.autograd.grad(heads, leaves, cotangent, retain_graph=True, allow_unused=True)
        return [
            (leaf.widened(g), leaf.widened(leaf.tensor.detach()))
            for g, leaf in zip(gradients, outputs, strict=True)
            if g is not None
        ]

    def _input_problems(
        self, projection: Projection, role: Block, operand: Tensor, one_token: Sequence[tuple[Tensor, Tensor]]
    ) -> list[str | None]:
        """What is wrong with each head of Q, K or V.

        Args:
            projection: The claims.
            role: The block that it is claimed to be.
            operand: What the heads move.
            one_token: Operands and directions in which the movement of one query token is looked at.
        """
        features = projection.head_features
        directions = torch.randn_like(operand)
        moves, acting, strays = [], [], []
        for head in range(self.num_heads):
            derivatives = self._derivatives(projection, operand[:, head], directions[:, head])
            if not derivatives:
                return ["moves no head"] * projection.num_heads
            limit = tolerance(derivatives[0][0].dtype)
            size = derivatives[0][1].shape[-1]
            unclaimed = self._unclaimed(projection, role, size)
            moves.append(slice_influence(derivatives, features, features) > limit)
            acting.append(acting_features(derivatives)[features])
            strays.append(
                bool(len(unclaimed) and slice_influence(derivatives, unclaimed[None], features) > limit)
            )
        tokens = [acting_tokens(self._derivatives(projection, *one), features) for one in one_token]
        num_tokens = torch.stack(tokens).amax(0)
        problems: list[str | None] = []
        for head in range(projection.num_heads):
            expected = set(range(head * projection.query_group, (head + 1) * projection.query_group))
            moved = {h for h in range(self.num_heads) if moves[h][head]}
            if moved != expected:
                problems.append(_instead(moved, expected))
                continue
            dead = int((~torch.stack([acting[h][head] for h in expected]).any(0)).sum())
            if dead:
                problems.append(f"{dead} of its {projection.head_dim} features do not act on the head")
            elif any(strays[h] for h in expected):
                problems.append("features outside the slice act on the head too")
            else:
                pooled = self._tokens_per_query(projection, scores=operand)
                is_both = "K" in projection.also and role == "Q"
                problems.append(None if is_both else _role_problem(role, num_tokens[:, head], pooled))
        return problems

    def _tokens_per_query(self, projection: Projection, scores: Tensor) -> int:
        """How many tokens are pooled into one query; 1 as a rule, and where a query would see all keys."""
        leaves = [leaf for leaf in self.outputs[projection.module_name] if len(leaf.columns)]
        tokens = sum(leaf.tensor.shape[:-1].numel() for leaf in leaves) // len(projection.map_names)
        pooled = max(1, tokens // (scores.shape[0] * scores.shape[2]))
        return pooled if pooled < scores.shape[3] else 1

    def _sways_scores(self, projection: Projection, scores: Tensor) -> bool:
        """Whether values out of a module of their own decide what is attended to."""
        others = [self.layer[block].module_name for block in ("Q", "K") if block in self.layer]
        if projection.module_name in others or projection.block != "V":  # there a stray feature of Q or K
            return False
        derivatives = self._derivatives(projection, scores, torch.randn_like(scores))
        return any(bool((g != 0).any()) for g, _ in derivatives)

    def _unclaimed(self, projection: Projection, role: Block, size: int) -> Tensor:
        """Features of the module that no block acting on the same operand claims."""
        together: set[Block] = {"V"} if role == "V" else {"Q", "K"}
        free = torch.ones(size, dtype=torch.bool)
        for block, other in self.layer.items():
            if together & {block, *other.also} and other.module_name == projection.module_name:
                free[other.head_features] = False
        return free.nonzero().flatten()

    def _output_problem(self, projection: Projection, head: int) -> str | None:
        if self.context is None:
            return "carries no head"
        features = projection.head_features[head].to(self.context.device)
        part = self.context.detach()[..., features]
        direction = torch.randn_like(part)
        if len(features) >= 3:
            part, direction = (t - t.mean(-1, keepdim=True) for t in (part, direction))
        # At a right angle to the context, and of sum zero, or the length or the mean of the context would
        # carry the movement through a normalisation.
        along = (direction * part).sum(-1, keepdim=True) / part.square().sum(-1, keepdim=True).clamp(
            min=1e-30
        )
        cotangent = torch.zeros_like(self.context)
        cotangent[..., features] = direction - along * part
        gradient = self.headed(
            torch.autograd.grad(self.context, self.probabilities, cotangent, retain_graph=True)
        )
        sizes = gradient.cpu().double().square().sum(dim=(0, 2, 3)).sqrt()
        moved = set((sizes > tolerance(gradient.dtype) * sizes.norm()).nonzero().flatten().tolist())
        if moved != {head}:
            return _instead(moved, {head}).replace("moves", "carries")
        # The derivative is linear in the cotangent: deriving it again gives the movement of each feature.
        any_direction = torch.zeros_like(self.context, requires_grad=True)
        linear = torch.autograd.grad(self.context, self.probabilities, any_direction, create_graph=True)
        own = self.headed(linear)[:, head]
        (movement,) = torch.autograd.grad(own, any_direction, torch.randn_like(own))
        carries = (movement != 0).flatten(0, -2).any(0).cpu()
        dead = int((~carries[projection.head_features[head]]).sum())
        if dead:
            return f"{dead} of its {len(features)} features carry nothing of the head"
        carries[projection.head_features] = False
        return "features outside the slice carry the head too" if bool(carries.any()) else None


def _instead(moved: set[int], expected: set[int]) -> str:
    def heads(numbers: set[int]) -> str:
        return f"head{'s' if len(numbers) > 1 else ''} {', '.join(map(str, sorted(numbers)))}"

    return f"moves {heads(moved)} instead of {heads(expected)}" if moved else "moves no head"


def _role_problem(block: Block, num_tokens: Tensor, pooled: int) -> str | None:
    """Whether the features act as what they are claimed to be, from how many tokens one query token sees."""
    seen = num_tokens[num_tokens > 0]
    if block == "Q":
        one = len(seen) and int(seen.min()) <= pooled
        return None if one else "acts at several tokens: a key, not a query"
    if len(seen) and int(seen.max()) > 1:
        return None
    return f"acts at one token only: not a {'key' if block == 'K' else 'value'}"
