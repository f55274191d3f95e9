"""The head map of a model: by names alone, or by derivatives where there is a batch to run it on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from qkov_lightning.heads.architectures import named_projections, projections_of, registered_modules
from qkov_lightning.heads.discovery import discover_projections, explain
from qkov_lightning.heads.projections import Projection, check_unique
from qkov_lightning.heads.shapes import ArchitectureError, how_to_register
from qkov_lightning.heads.verification import call


def find_projections(
    model: nn.Module, batch: Any = None, *, forward: Callable[[Any], object] | None = None
) -> list[Projection]:
    """The Q, K, V and O projections of every attention layer, in the order of the model's modules.

    Without a batch, layers are placed by the names of their modules. With one, by one forward pass: no name
    and no config is read, only which features of which linear map move which head, and every head is proven.
    A weight need not be a module's: products with a parameter are found, too.

    Args:
        model: Any module with attention layers inside; left as found.
        batch: One or a few samples of at least two tokens: a mapping is passed by keyword (without the
            entries for the monitor), a tuple or list by position, anything else as the one argument.
        forward: Runs the model on the batch, if calling it is not enough.

    Returns:
        Projections, layer by layer.

    Raises:
        ArchitectureError: If there is no attention, or an attention layer cannot be placed with certainty.
            The message says what was seen and what to write.
    """
    if batch is None:
        return named_projections(model)
    run = forward or (lambda inputs: call(model, inputs))
    try:
        found = discover_projections(model, lambda: run(batch))
    except (RuntimeError, NotImplementedError) as error:
        raise ArchitectureError(
            f"The forward pass of {type(model).__name__} failed while derivatives were taken: {error} Kernels without a "
            'derivative hide attention: load the model with attn_implementation="sdpa" or "eager".'
        ) from error
    registered = registered_modules(model)

    def is_registered(where: str) -> bool:
        return any(where == name or where.startswith(f"{name}.") or not name for name in registered)

    refused = [(where, why) for where, why in found.refused if not is_registered(where)]
    if refused:
        raise ArchitectureError(f"{explain(refused)} {_remedy(model, refused[0][0])}")
    layers: dict[int, list[Projection]] = {}
    for projection in found.projections:
        if not is_registered(projection.map_names[0]):
            layers.setdefault(projection.layer, []).append(projection)
    ordered = [
        *layers.values(),
        *(projections_of(model, name, one) for name, one in registered.items() if one),
    ]
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    ordered.sort(key=lambda layer: order.get(layer[0].map_names[0], len(order)) if registered else 0)
    placed = [replace(p, layer=number) for number, layer in enumerate(ordered) for p in layer]
    if not placed:
        raise ArchitectureError(
            f"No attention was seen in the forward pass of {type(model).__name__}: no softmax over tokens whose scores come "
            'from linear maps. Fused kernels hide it: load the model with attn_implementation="sdpa" or "eager".'
        )
    check_unique(placed)
    return placed


def _remedy(model: nn.Module, where: str) -> str:
    try:
        return how_to_register(model.get_submodule(where))
    except AttributeError:
        return "Leave its module out: `register_architecture(<its class>, lambda attention: {})`."
