"""A conflict in a known cell.

One head's block serves task A, and task B wants something else of it, and only of it.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from qkov_lightning import HeadInterference, InterferenceHeatmap, ScoreSettings, find_projections
from qkov_lightning.measure.cells import BlockInfo, Layer
from qkov_lightning.scores.scores import SCORES
from qkov_lightning.scores.updates import UpdateDirection

WIDTH, HEADS, LAYERS, TOKENS = 12, 3, 2, 6


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        logits = query @ key.transpose(-1, -2)
        return self.o_proj((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))


class Regressor(nn.Module):
    """Numbers in, numbers out, attention with residuals in between."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = functional.layer_norm(x + layer(x), (WIDTH,))
        return self.head(x)


PARTNER = {"Q": "k_proj", "K": "q_proj", "V": "o_proj", "O": "v_proj"}
"""What multiplies a block inside its head."""

GAIN = 10.0

STEP_SIZE: dict[UpdateDirection, float] = {"adam": 0.1, "sgd": 1e-3}
"""Large enough that the curvature counts: A has converged, and its mean gradient is noise."""


def plant(
    seed: int, update: UpdateDirection = "adam", conflict: bool = True, num_samples: int = 96
) -> tuple[str, InterferenceHeatmap]:
    """A model with a conflict in one cell, drawn at random.

    The cell is divided, and what multiplies it inside its head multiplied, by the same number: the model
    computes what it did, but every change of this cell has more effect. Task A's targets are the model's own
    outputs and noise: the model, and in it this cell above all, serves A. Task B's targets are those of the
    same model with another cell.

    Args:
        seed: Of everything.
        update: Direction in which B updates.
        conflict: False leaves task B the targets of the model itself.
        num_samples: Samples of each task.

    Returns:
        Name of the cell, and a heatmap of what B does to A.
    """
    torch.manual_seed(seed)
    model = Regressor()
    for parameter in model.layers.parameters():
        nn.init.normal_(parameter, std=1.2 / WIDTH**0.5)
    projections = find_projections(model)
    projection = projections[int(torch.randint(len(projections), ()))]
    head = int(torch.randint(HEADS, ()))
    own = projection.head_features[head]
    at = (slice(None), own) if projection.block == "O" else own
    partner_at = own if projection.block == "O" else (slice(None), own) if projection.block == "V" else own
    attention = model.layers[projection.layer]
    model.get_submodule(projection.module_name).weight.data[at] /= GAIN
    getattr(attention, PARTNER[projection.block]).weight.data[partner_at] *= GAIN
    other = copy.deepcopy(model)
    weight = other.get_submodule(projection.module_name).weight.data
    changed = torch.randn_like(weight[at]) * weight[at].std()
    if conflict:
        weight[at] += changed
    inputs = torch.randn(2 * num_samples, TOKENS, WIDTH)
    with torch.no_grad():
        targets = torch.cat([model(inputs[:num_samples]), other(inputs[num_samples:])])
    targets += 0.05 * torch.randn_like(targets)
    weights = {name: value.detach() for name, value in model.named_parameters()}

    def loss(own: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (functional_call(model, own, (x[None],)) - y[None]).square().mean() / (2 * 0.05**2)

    gradients = vmap(grad(loss), (None, 0, 0))(weights, inputs, targets)
    metric = HeadInterference(
        ["a", "b"], LAYERS, HEADS, settings=ScoreSettings(update=update, step_size=STEP_SIZE[update])
    )
    layers = [Layer(f"layers.{index}", {}) for index in range(LAYERS)]
    for one in projections:
        dense = gradients[f"{one.module_name}.weight"]
        dense = dense.transpose(1, 2) if one.block == "O" else dense
        samples = dense.unflatten(1, (HEADS, -1)).flatten(2)
        fisher = samples.square().unflatten(0, (2, -1)).mean(dim=(0, 1))
        metric.update(
            samples, ["a"] * num_samples + ["b"] * num_samples, fisher, layer=one.layer, block=one.block
        )
        layers[one.layer].blocks[one.block] = BlockInfo(one.module_name, HEADS, 1, "measured")  # type: ignore[index]
    result = metric.compute()
    heatmap = InterferenceHeatmap(
        ("a", "b"),
        tuple(layers),
        {score: result[score] for score in SCORES},
        {score: result[f"{score}_standard_error"] for score in SCORES},
        result["num_samples"],
    )
    return f"L{projection.layer}.H{head}.{projection.block}", heatmap


def named_first(seed: int, update: UpdateDirection = "adam") -> bool:
    """Whether the planted cell has the largest predicted rise."""
    cell, heatmap = plant(seed, update)
    return heatmap.cells("a", "b", "loss_rise")[0].name == cell
