"""Find the attention layers of a model and place their heads, or refuse.

Separate projections are placed by the names of their modules, fused ones by a known convention; both are checked
against shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor, nn

from qkov_lightning.heads.conventions import (
    BORROWS_KEYS_AND_VALUES,
    FUSED,
    FUSED_NAMES,
    GATED_QUERY,
    HEAD_DIM,
    LATENT,
    LATENT_QUERIES,
    LINEAR_ATTENTION,
    NOT_SOFTMAX,
    NUM_HEADS,
    NUM_KV_HEADS,
    OUTPUT,
    QUERY_GROUP,
    SEPARATE,
    TILED_GROUPS,
    Placement,
    follows,
    in_blocks,
    refusal,
)
from qkov_lightning.heads.projections import BLOCKS, Block, Projection, check_unique, contiguous_heads

HeadMap = Mapping[Block, tuple[str, Int[Tensor, "head feature"]]]
"""For each block: path of its module inside the attention module, and the features of each head."""

Recogniser = Callable[[nn.Module], HeadMap]


class ArchitectureError(ValueError):
    """An attention layer cannot be placed with certainty."""


_registered: dict[str, Recogniser] = {}


def register_architecture(class_name: str, recogniser: Recogniser) -> None:
    """Teach ``find_projections`` an attention class.

    Args:
        class_name: Name of the attention module's class.
        recogniser: Gives the head map of such a module, or an empty one to pass it over.

    Example:
        An attention with a fused projection that interleaves key, query and value inside each head:

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
        >>> [projection.block for projection in find_projections(torch.nn.Sequential(MyAttention()))]
        ['Q', 'K', 'V', 'O']
    """
    _registered[class_name] = recogniser


def find_projections(model: nn.Module) -> list[Projection]:
    """The Q, K, V and O projections of every attention layer, in the order of the model's modules.

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
                suspects[name] = f"{_unknown(name, module)} {_how_to_register(module)}"
            continue
        placed.add(name)
        if head_map:
            projections += _layer(layer, name, head_map, model)
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


def _is_inside(name: str, containers: set[str]) -> bool:
    return any(
        name == container or name.startswith(f"{container}.") or not container for container in containers
    )


def _layer(layer: int, name: str, head_map: HeadMap, model: nn.Module) -> list[Projection]:
    num_query_heads = head_map["Q"][1].shape[0] if "Q" in head_map else 0
    result = []
    for block in BLOCKS:
        if block not in head_map:
            continue
        path, features = head_map[block]
        module_name = _resolve(name, path)
        model.get_submodule(module_name)
        group = max(1, num_query_heads // features.shape[0])
        result.append(Projection(module_name, layer, _label(name), block, features.to(torch.int64), group))
    return result


def _resolve(name: str, path: str) -> str:
    """Dotted path of a module given relative to ``name``; each leading ``^.`` goes up by one."""
    while path.startswith("^."):
        name, path = name.rpartition(".")[0], path[2:]
    return f"{name}.{path}" if name and path else name or path


def _label(name: str) -> str:
    return name.removesuffix(".self") or "attention"


def _recognise(model: nn.Module, name: str, module: nn.Module) -> HeadMap | None:
    for cls in type(module).__mro__:
        if cls.__name__ in _registered:
            return _registered[cls.__name__](module)
    if isinstance(module, nn.MultiheadAttention):
        return _packed(name, module)
    if next(module.children(), None) is None or _is_linear_attention(module):
        return None
    place = _placement(module)
    if place is None:
        return None
    # Kimi Linear names its latent attention, which has a softmax, after itself.
    reason = None if place is _latent else refusal(module)
    if reason is not None:
        raise ArchitectureError(
            f"{_unknown(name, module, reason)} Leave such layers out: "
            f'register_architecture("{type(module).__name__}", lambda attention: {{}})'
        )
    return place(model, name, module)


def _placement(module: nn.Module) -> Callable[[nn.Module, str, nn.Module], HeadMap] | None:
    """How to place an attention module, if the names of its parts are known."""
    if _is_linear(_child(module, LATENT)):
        return _latent
    for names in SEPARATE:
        if all(_is_linear(_child(module, child)) for child in names):
            return partial(_separate, names=names)
        if _is_linear(_child(module, names[0])) and getattr(module, BORROWS_KEYS_AND_VALUES, False):
            return partial(_separate, names=names[:1])
        # A model whose keys are its values has the name of the value projection, but no module there.
        if (
            all(_is_linear(_child(module, child)) for child in names[:2])
            and getattr(module, names[2], 0) is None
        ):
            return partial(_separate, names=names[:2])
    for leaf, child in module.named_children():
        for place, classes in FUSED:
            if _is_linear(child) and follows(module, classes, f".{leaf}"):
                return partial(_fused, leaf=leaf, place=place)
    return None


def _separate(model: nn.Module, name: str, module: nn.Module, names: tuple[str, ...]) -> HeadMap:
    rows_q, *rows_kv = (linear_sizes(module.get_submodule(child))[1] for child in names)
    heads = _num_heads(model, name, module)
    output = _output(model, name, module)
    head_dim = _divide(name, names[0], rows_q, heads)
    declared = _declared(model, name, module, HEAD_DIM)
    gated = follows(module, GATED_QUERY)
    if declared is not None and head_dim != declared * (2 if gated else 1):
        raise ArchitectureError(
            f"Attention `{name}` ({type(module).__name__}): `{names[0]}` has {rows_q} rows, expected {heads} heads x "
            f"{declared} = {heads * declared}. {_how_to_register(module)}"
        )
    if gated:
        query = contiguous_heads(2 * heads, head_dim // 2)[::2]
        head_dim //= 2
    else:
        query = contiguous_heads(heads, head_dim)
    head_map: dict[Block, tuple[str, Tensor]] = {"Q": (names[0], query)}
    value_dim = head_dim
    if rows_kv:
        rows_k = rows_kv[0]
        kv_heads = _num_kv_heads(model, name, module, heads) or _divide(name, names[1], rows_k, head_dim)
        if kv_heads * head_dim != rows_k or heads % kv_heads:
            raise ArchitectureError(
                f"Attention `{name}` ({type(module).__name__}): `{names[1]}` has {rows_k} rows, expected {kv_heads} "
                f"key-value heads x {head_dim} = {kv_heads * head_dim}, and {kv_heads} to divide the {heads} query "
                f"heads. {_how_to_register(module)}"
            )
        if kv_heads not in (1, heads) and follows(module, TILED_GROUPS):
            raise ArchitectureError(
                f"Attention `{name}` ({type(module).__name__}): each of {kv_heads} key-value heads serves every "
                f"{kv_heads}th query head, expected {heads // kv_heads} query heads in a row. Use as many key-value "
                f"heads as query heads, or leave the keys and values out. {_how_to_register(module)}"
            )
        head_map["K"] = (names[1], contiguous_heads(kv_heads, head_dim))
    if rows_kv[1:]:
        value_dim = _divide(name, names[2], rows_kv[1], kv_heads)
        head_map["V"] = (names[2], contiguous_heads(kv_heads, value_dim))
    head_map["O"] = (output, _output_heads(model, name, module, output, heads, value_dim))
    return head_map


def _packed(name: str, module: nn.MultiheadAttention) -> HeadMap:
    if module.in_proj_weight is None:
        raise ArchitectureError(
            f"Attention `{name}` (MultiheadAttention) has keys of size {module.kdim} and values of size {module.vdim}, "
            f"expected those of the queries, {module.embed_dim}: with other sizes PyTorch keeps three weights that "
            "belong to no module. Project keys and values to the size of the queries first. "
            + _how_to_register(module)
        )
    query, key, value = in_blocks(module.num_heads, module.num_heads, module.head_dim)
    return {"Q": ("", query), "K": ("", key), "V": ("", value), "O": ("out_proj", query)}


def _latent(model: nn.Module, name: str, module: nn.Module) -> HeadMap:
    heads = _num_heads(model, name, module)
    query = next((path for path in LATENT_QUERIES if _is_linear(_child(module, path))), None)
    sizes = [
        _declared(model, name, module, (a,)) for a in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    ]
    if query is None or None in sizes:
        raise ArchitectureError(f"{_unknown(name, module)} {_how_to_register(module)}")
    key_dim, rotary_dim, value_dim = (size or 0 for size in sizes)
    for path, head_dim in ((query, key_dim + rotary_dim), (LATENT, key_dim + value_dim)):
        rows = linear_sizes(module.get_submodule(path))[1]
        if rows != heads * head_dim:
            raise ArchitectureError(
                f"Attention `{name}` ({type(module).__name__}): `{path}` has {rows} rows, expected {heads} heads x "
                f"{head_dim} = {heads * head_dim}. {_how_to_register(module)}"
            )
    output = _output(model, name, module)
    pieces = contiguous_heads(heads, key_dim + value_dim)
    return {
        "Q": (query, contiguous_heads(heads, key_dim + rotary_dim)),
        "K": (LATENT, pieces[:, :key_dim]),
        "V": (LATENT, pieces[:, key_dim:]),
        "O": (output, _output_heads(model, name, module, output, heads, value_dim)),
    }


def _fused(
    model: nn.Module,
    name: str,
    module: nn.Module,
    leaf: str,
    place: Placement,
) -> HeadMap:
    rows = linear_sizes(module.get_submodule(leaf))[1]
    heads = _num_heads(model, name, module)
    output = _output(model, name, module)
    head_dim = _divide(name, output, linear_sizes(model.get_submodule(_resolve(name, output)))[0], heads)
    output_heads = (output, contiguous_heads(heads, head_dim))
    if _is_linear(_child(module, "q_attn")) and rows == 2 * heads * head_dim:  # GPT-2 cross-attention
        keys, values = contiguous_heads(2 * heads, head_dim).split(heads)
        return {
            "Q": ("q_attn", contiguous_heads(heads, head_dim)),
            "K": (leaf, keys),
            "V": (leaf, values),
            "O": output_heads,
        }
    kv_heads = _num_kv_heads(model, name, module, heads) or heads
    if (heads + 2 * kv_heads) * head_dim != rows or heads % kv_heads:
        raise ArchitectureError(
            f"Attention `{name}` ({type(module).__name__}): `{leaf}` has {rows} rows, expected ({heads} query heads + "
            f"2 x {kv_heads} key-value heads) x {head_dim} = {(heads + 2 * kv_heads) * head_dim}. "
            + _how_to_register(module)
        )
    query, key, value = place(heads, kv_heads, head_dim)
    return {"Q": (leaf, query), "K": (leaf, key), "V": (leaf, value), "O": output_heads}


def _output(model: nn.Module, name: str, module: nn.Module) -> str:
    """Path of the output projection: a child, or a neighbour as in BERT (`self` beside `output.dense`).

    Raises:
        ArchitectureError: If there is none.
    """
    for path in OUTPUT:
        if _is_linear(_child(module, path)):
            return path
    if name and _is_linear(_child(model.get_submodule(name.rpartition(".")[0]), "output.dense")):
        return "^.output.dense"
    raise ArchitectureError(
        f"Attention `{name}` ({type(module).__name__}) has no output projection: expected one of "
        f"{', '.join(OUTPUT)}; found {_linear_children(module)}. {_how_to_register(module)}"
    )


def _output_heads(
    model: nn.Module, name: str, module: nn.Module, output: str, heads: int, value_dim: int
) -> Tensor:
    columns = linear_sizes(model.get_submodule(_resolve(name, output)))[0]
    if columns != heads * value_dim:
        raise ArchitectureError(
            f"Attention `{name}` ({type(module).__name__}): `{output}` has {columns} columns, expected {heads} heads x "
            f"{value_dim} (the size of a value head) = {heads * value_dim}. {_how_to_register(module)}"
        )
    return contiguous_heads(heads, value_dim)


def _num_heads(model: nn.Module, name: str, module: nn.Module) -> int:
    heads = _declared(model, name, module, NUM_HEADS)
    if heads is None:
        raise ArchitectureError(
            f"Attention `{name}` ({type(module).__name__}): the number of heads is unknown. Neither the module nor "
            f"the model's config has one of {', '.join(NUM_HEADS)}; found {_linear_children(module)}. "
            + _how_to_register(module)
        )
    return heads


def _num_kv_heads(model: nn.Module, name: str, module: nn.Module, heads: int) -> int | None:
    own = _first(module, NUM_KV_HEADS)
    group = _first(module, QUERY_GROUP)
    if own is None and group:
        return heads // group
    config = _config(model, name)
    # Encoder and decoder may share a config that counts the heads of one of them only.
    return _first(config, NUM_KV_HEADS) if own is None and _first(config, NUM_HEADS) in (heads, None) else own


def _declared(model: nn.Module, name: str, module: nn.Module, attributes: tuple[str, ...]) -> int | None:
    """A number that the attention module says of itself, else the config of the nearest module around it."""
    own = _first(module, attributes)
    return _first(_config(model, name), attributes) if own is None else own


def _config(model: nn.Module, name: str) -> object:
    while True:
        config = getattr(model.get_submodule(name), "config", None)
        if config is not None or not name:
            return config
        name = name.rpartition(".")[0]


def _first(holder: object, attributes: tuple[str, ...]) -> int | None:
    for attribute in attributes:
        value = _get(holder, attribute)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _get(holder: object, attribute: str) -> object:
    if isinstance(holder, Mapping):
        return holder.get(attribute)
    try:
        return getattr(holder, attribute, None)
    except Exception:  # a config may refuse to name one number where its layers differ
        return None


def _divide(name: str, path: str, features: int, parts: int) -> int:
    if features % parts:
        raise ArchitectureError(
            f"Attention `{name}`: the {features} features of `{path}` do not divide into {parts} equal parts. "
            "Check the number of heads in the model's config."
        )
    return features // parts


def _child(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _is_linear(module: nn.Module | None) -> bool:
    if module is None:
        return False
    weight = getattr(module, "weight", None)
    return hasattr(module, "in_features") or (
        isinstance(weight, Tensor) and weight.ndim == 2 and hasattr(module, "nf")
    )


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """Input and output features of a linear module, whatever the layout of its weight."""
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    inputs, outputs = module.get_parameter("weight").shape  # Conv1D of GPT-2: inputs first
    return inputs, outputs


def _is_linear_attention(module: nn.Module) -> bool:
    return any(hasattr(module, part) for part in NOT_SOFTMAX) or follows(module, LINEAR_ATTENTION)


def _looks_like_attention(module: nn.Module) -> bool:
    linear = [name for name, child in module.named_children() if _is_linear(child)]
    if _is_linear_attention(module):
        return False
    if any(name in FUSED_NAMES for name in linear):
        return True
    return any(word in type(module).__name__.lower() for word in ("attention", "attn")) and len(linear) >= 2


def _linear_children(module: nn.Module) -> str:
    found = [
        f"`{name}` {linear_sizes(child)}"
        for name, child in module.named_modules()
        if name and _is_linear(child)
    ]
    return ", ".join(found) + " (inputs, outputs)" if found else "no linear module"


def _unknown(name: str, module: nn.Module, what: str = "an unknown layout") -> str:
    return (
        f"Attention `{name}` ({type(module).__module__}.{type(module).__name__}) has {what}; found "
        f"{_linear_children(module)}."
    )


def _how_to_register(module: nn.Module) -> str:
    """The line to write: complete for one fused projection and an output, else with places to fill in."""
    heads = _first(module, NUM_HEADS)
    linear = {
        name: linear_sizes(child) for name, child in module.named_modules() if name and _is_linear(child)
    }
    fused = [
        name
        for name, (_, rows) in linear.items()
        if heads and rows % (3 * heads) == 0 and name in FUSED_NAMES
    ]
    output = [name for name in linear if name in OUTPUT]
    if heads and len(fused) == len(output) == 1:
        head_dim = linear[fused[0]][1] // (3 * heads)
        places = [
            f'"{block}": ("{fused[0]}", contiguous_heads({heads}, {head_dim}, start={i * heads * head_dim}))'
            for i, block in enumerate("QKV")
        ]
        places.append(f'"O": ("{output[0]}", contiguous_heads({heads}, {head_dim}))')
        say = "If all queries come first, then all keys, then all values (verify_projections tells), write"
    else:
        places = [
            '"Q": ("<module>", contiguous_heads(num_heads, head_dim))',
            '"K": ...',
            '"V": ...',
            '"O": ...',
        ]
        say = "Say which features belong to each head"
    return (
        f"{say} (or return {{}} to leave such layers out): "
        f'register_architecture("{type(module).__name__}", lambda attention: {{{", ".join(places)}}})'
    )
