"""The head map of a model in words, before any training."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from qkov_lightning.heads.architectures import find_projections
from qkov_lightning.heads.projections import Projection
from qkov_lightning.heads.shapes import linear_sizes
from qkov_lightning.heads.weights import is_trainable


def describe(
    model: nn.Module, num_tokens: int = 512, projections: Sequence[Projection] | None = None
) -> Table:
    """The head map as a table: a row per layer and block, totals below.

    Args:
        model: Any module with attention layers inside.
        num_tokens: Tokens of a sample, for the estimate of its size in the cache.
        projections: The head map; ``find_projections(model)`` if left out.

    Returns:
        A table for Rich.

    Raises:
        ArchitectureError: If the model's attention cannot be placed.
    """
    placed = find_projections(model) if projections is None else list(projections)
    table = Table(title=f"Attention heads of {type(model).__name__}", title_justify="left")
    for column in ("layer", "block", "heads", "head size", "module", "features", "state"):
        table.add_column(column, justify="right" if column in ("heads", "head size") else "left")
    for index, projection in enumerate(placed):
        first = index == 0 or placed[index - 1].layer != projection.layer
        if first and index:
            table.add_section()
        table.add_row(
            escape(f"L{projection.layer} {projection.layer_name}") if first else "",
            projection.block,
            _heads(projection),
            str(projection.head_dim),
            escape(projection.module_name or type(model).__name__),
            f"{projection.feature_axis} {ranges(projection.head_features)}",
            "trained" if is_trainable(model.get_submodule(projection.module_name)) else "frozen",
        )
        last = index + 1 == len(placed) or placed[index + 1].layer != projection.layer
        shared = _shared_by_all_heads(model, placed, projection.layer) if last else []
        if shared:
            table.add_row("", "", "all", "", escape(", ".join(shared)), "no slice per head", "not shown")
    covered, total = covered_parameters(model, placed), sum(p.numel() for p in model.parameters())
    table.caption_justify = "left"
    table.caption = (
        f"{covered:,} of {total:,} parameters covered ({covered / max(total, 1):.0%}); a sample of {num_tokens} tokens "
        f"takes about {_in_units(cache_bytes_per_sample(model, num_tokens, placed))} in the cache"
    )
    return table


def _heads(projection: Projection) -> str:
    if projection.query_group == 1:
        return str(projection.num_heads)
    return f"{projection.num_heads} (each for {projection.query_group} query heads)"


def ranges(head_features: Tensor) -> str:
    """Features of the first heads, as ranges with both ends included.

    >>> ranges(torch.arange(12).view(3, 4))
    '0-3, 4-7, 8-11'
    """
    heads = []
    for features in head_features[:3].tolist():
        starts = [i for i, f in enumerate(features) if i == 0 or f != features[i - 1] + 1]
        ends = [*[i - 1 for i in starts[1:]], len(features) - 1]
        heads.append("+".join(f"{features[a]}-{features[b]}" for a, b in zip(starts, ends, strict=True)))
    return ", ".join(heads) + (", ..." if len(head_features) > 3 else "")


def _in_units(num_bytes: int) -> str:
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 2**power:
            return f"{num_bytes / 2**power:.1f} {unit}"
    return f"{num_bytes} bytes"


def _modules(projections: Sequence[Projection]) -> dict[str, list[Projection]]:
    modules: dict[str, list[Projection]] = {}
    for projection in projections:
        modules.setdefault(projection.module_name, []).append(projection)
    return modules


def module_sizes(model: nn.Module, name: str) -> tuple[int, int]:
    """Input and output features of the module of a projection."""
    module = model.get_submodule(name)
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, 3 * module.embed_dim
    return linear_sizes(module)


def covered_parameters(model: nn.Module, projections: Sequence[Projection]) -> int:
    """Weights (of adapters: effective weights) that some head owns."""
    total = 0
    for name, owners in _modules(projections).items():
        inputs, outputs = module_sizes(model, name)
        for owner in {owner.block: owner for owner in owners}.values():
            total += owner.head_features.numel() * (outputs if owner.block == "O" else inputs)
    return total


def cache_bytes_per_sample(
    model: nn.Module, num_tokens: int, projections: Sequence[Projection] | None = None
) -> int:
    """About what one sample takes in the cache: factors or gradients, whichever is smaller.

    Reckons that Q, K and V of a layer read one input, and that each module runs once per sample.

    Args:
        model: Holds the projections; frozen ones are not cached.
        num_tokens: Tokens of the sample.
        projections: The head map; ``find_projections(model)`` if left out.

    Returns:
        Bytes.

    Raises:
        ArchitectureError: If the model's attention cannot be placed.
    """
    placed = find_projections(model) if projections is None else projections
    groups: dict[tuple[int, bool], set[str]] = {}
    seen: set[str] = set()
    for p in placed:
        if p.module_name not in seen and is_trainable(model.get_submodule(p.module_name)):
            groups.setdefault((p.layer, p.block == "O"), set()).add(p.module_name)
            seen.add(p.module_name)
    width = next((p.element_size() for p in model.parameters() if p.is_floating_point()), 4)
    total = 0
    for names in groups.values():
        sizes = [module_sizes(model, name) for name in names]
        inputs = sum({one for one, _ in sizes})
        factors = num_tokens * (inputs + sum(outputs for _, outputs in sizes)) * width
        total += min(factors, sum(one * outputs for one, outputs in sizes) * max(width, 4))
    return total


def _shared_by_all_heads(model: nn.Module, placed: Sequence[Projection], layer: int) -> list[str]:
    """Linear modules inside an attention of which no head has a slice, as the latents of latent attention."""
    names = [p.module_name for p in placed if p.layer == layer]
    if any(isinstance(model.get_submodule(name), nn.MultiheadAttention) for name in names):
        return []
    parents = [name.split(".")[:-1] for name in names]
    container = [parts[0] for parts in zip(*parents, strict=False) if len(set(parts)) == 1]
    attention = model.get_submodule(".".join(container))
    known = {id(module) for name in names for module in model.get_submodule(name).modules()}
    return [
        f"{'.'.join([*container, name])}"
        for name, module in attention.named_children()
        if id(module) not in known and hasattr(module, "in_features")
    ]


def load_model(source: str) -> nn.Module:
    """A model from ``package.module:function``, called without arguments, or a ``from_pretrained`` folder.

    Raises:
        ValueError: If the source is neither, or gives no module.
    """
    if Path(source).is_dir():
        from transformers import AutoModel

        loaded: nn.Module = AutoModel.from_pretrained(source, local_files_only=True)
        return loaded
    module_name, colon, name = source.partition(":")
    if not colon:
        raise ValueError(
            f"`{source}` is no folder and no import path: expected a local `from_pretrained` folder, or "
            "`package.module:function` where the function returns the model."
        )
    sys.path.insert(0, str(Path.cwd()))
    try:
        function: Callable[[], object] = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"`{source}` cannot be imported: {error}.") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    model = function()
    if not isinstance(model, nn.Module):
        raise ValueError(f"`{source}` returned a {type(model).__name__}, expected a torch.nn.Module.")
    return model


def random_batch(model: nn.Module, num_tokens: int = 8) -> Any:
    """Two random samples, for models that take ``input_ids`` or ``pixel_values``.

    A LightningModule with an ``example_input_array`` gives that.

    Raises:
        ValueError: If the model says that it takes something else, or not how many tokens or pixels it knows.
    """
    example = getattr(model, "example_input_array", None)
    if example is not None:
        return example
    config = next(_configs(model), None)
    takes = getattr(model, "main_input_name", "input_ids")
    generator = torch.Generator().manual_seed(0)
    vocabulary, side = (getattr(config, name, None) for name in ("vocab_size", "image_size"))
    if takes == "pixel_values" and isinstance(side, int):
        frames = getattr(config, "num_frames", None)  # of a video
        shape = (2, *([] if frames is None else [frames]), getattr(config, "num_channels", 3), side, side)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    if takes != "input_ids" or not isinstance(vocabulary, int):
        raise ValueError(
            f"{type(model).__name__} takes neither tokens of a known number nor images of a known size: give it an "
            "`example_input_array`, or verify it in Python with a sample of yours, `verify_projections(model, batch)`."
        )
    tokens = torch.randint(vocabulary, (2, num_tokens), generator=generator)
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    return {"input_ids": tokens, **({"decoder_input_ids": tokens} if encoder_decoder else {})}


def _configs(model: nn.Module) -> Iterator[object]:
    return (module.config for module in model.modules() if hasattr(module, "config"))
