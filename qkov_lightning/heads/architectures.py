"""Find the attention layers of a model and place their heads, or refuse.

Separate projections are placed by the names of their modules, fused ones by a known convention; both are
checked against shapes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from qkov_lightning.heads.conventions import (
    FUSED_NAMES,
    SEPARATE,
    refusal,
)
from qkov_lightning.heads.placement import (
    HeadMap,
    is_linear_attention,
    place_latent,
    place_packed,
    placement_of,
    resolve,
)
from qkov_lightning.heads.projections import BLOCKS, Block, Projection, check_unique
from qkov_lightning.heads.shapes import ArchitectureError, how_to_register, is_linear, unknown

Recogniser = Callable[[nn.Module], HeadMap]


_registered: dict[str, Recogniser] = {}


def register_architecture(class_name: str, recogniser: Recogniser) -> None:
    """Teach ``find_projections`` an attention class.

    Args:
        class_name: Name of the attention module's class.
        recogniser: Gives the head map of such a module, or an empty one to pass it over.

    Example:
        An attention with a fused projection that interleaves key, query and value inside each head:

        >>> from qkov_lightning import contiguous_heads
        >>> class MyAttention(torch.nn.Module):
        ...     def __init__(self, width=32, heads=4):
        ...         super().__init__()
        ...         self.heads, self.size = heads, width // heads
        ...         self.kqv = torch.nn.Linear(width, 3 * width)
        ...         self.out = torch.nn.Linear(width, width)
        >>> def my_heads(attention):
        ...     pieces = contiguous_heads(3 * attention.heads, attention.size)
        ...     return {
        ...         "K": ("kqv", pieces[0::3]),
        ...         "Q": ("kqv", pieces[1::3]),
        ...         "V": ("kqv", pieces[2::3]),
        ...         "O": ("out", contiguous_heads(attention.heads, attention.size)),
        ...     }
        >>> register_architecture("MyAttention", my_heads)
        >>> [projection.block for projection in named_projections(torch.nn.Sequential(MyAttention()))]
        ['Q', 'K', 'V', 'O']
    """
    _registered[class_name] = recogniser


def named_projections(model: nn.Module) -> list[Projection]:
    """The Q, K, V and O projections of every attention layer, placed by names, in the order of the modules.

    Args:
        model: Any module with attention layers inside.

    Returns:
        Projections, layer by layer.

    Raises:
        ArchitectureError: If there is no attention, or an attention layer cannot be placed with
            certainty. The message shows what was found and what to write.
    """
    projections: list[Projection] = []
    placed: set[str] = set()
    suspects: dict[str, str] = {}
    layer = 0
    for name, module in model.named_modules():
        if _is_inside(name, placed):
            continue
        try:
            head_map = _recognise(model, name, module)
        except ArchitectureError as error:
            suspects[name] = str(error)
            continue
        if head_map is None:
            if _looks_like_attention(module):
                suspects[name] = f"{unknown(name, module)} {how_to_register(module)}"
            continue
        placed.add(name)
        if head_map:
            projections += projections_of(model, name, head_map, layer)
            layer += 1
    for name, message in suspects.items():
        # A wrapper around an attention that was placed is none itself.
        if not _is_inside(name, placed) and not any(_is_inside(other, {name}) for other in placed):
            raise ArchitectureError(message)
    if not projections:
        raise ArchitectureError(
            f"No attention layer was found in {type(model).__name__}. Known names are "
            + "; ".join("/".join(names) for names in SEPARATE)
            + ". Declare others with `register_architecture(<class name>, <function>)`."
        )
    check_unique(projections)
    return projections


def registered_modules(model: nn.Module) -> dict[str, HeadMap]:
    """What ``register_architecture`` says of the modules of a model."""
    return {
        name: _registered[cls.__name__](module)
        for name, module in model.named_modules()
        for cls in type(module).__mro__[:1]
        if cls.__name__ in _registered
    }


def _is_inside(name: str, containers: set[str]) -> bool:
    return any(
        name == container or name.startswith(f"{container}.") or not container for container in containers
    )


def projections_of(model: nn.Module, name: str, head_map: HeadMap, layer: int = 0) -> list[Projection]:
    """The projections of one attention module.

    Args:
        model: Holds it.
        name: Path of the attention module.
        head_map: Its heads.
        layer: Its number.
    """
    num_query_heads = head_map["Q"][1].shape[0] if "Q" in head_map else 0
    result = []
    is_shared = "K" in head_map and head_map.get("V") is head_map["K"]
    for block in BLOCKS:
        if block not in head_map or (block == "V" and is_shared):
            continue
        path, features = head_map[block]
        module_name = resolve(name, path)
        model.get_submodule(module_name)
        group = max(1, num_query_heads // features.shape[0])
        also: tuple[Block, ...] = ("V",) if block == "K" and is_shared else ()
        result.append(
            Projection(module_name, layer, _label(name), block, features.to(torch.int64), group, also=also)
        )
    return result


def _label(name: str) -> str:
    return name.removesuffix(".self") or "attention"


def _recognise(model: nn.Module, name: str, module: nn.Module) -> HeadMap | None:
    for cls in type(module).__mro__:
        if cls.__name__ in _registered:
            return _registered[cls.__name__](module)
    if isinstance(module, nn.MultiheadAttention):
        return place_packed(name, module)
    if next(module.children(), None) is None or is_linear_attention(module):
        return None
    place = placement_of(module)
    if place is None:
        return None
    # Kimi Linear names its latent attention, which has a softmax, after itself.
    reason = None if place is place_latent else refusal(module)
    if reason is not None:
        raise ArchitectureError(
            f"{unknown(name, module, reason)} Leave such layers out: "
            f'register_architecture("{type(module).__name__}", lambda attention: {{}})'
        )
    return place(model, name, module)


def _looks_like_attention(module: nn.Module) -> bool:
    linear = [name for name, child in module.named_children() if is_linear(child)]
    if is_linear_attention(module):
        return False
    if any(name in FUSED_NAMES for name in linear):
        return True
    return any(word in type(module).__name__.lower() for word in ("attention", "attn")) and len(linear) >= 2
