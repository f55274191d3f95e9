"""The heads of one attention module (separate, fused, packed or latent), checked against its shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from jaxtyping import Int
from torch import Tensor, nn

from qkov_lightning.heads.conventions import (
    BORROWS_KEYS_AND_VALUES,
    FUSED,
    GATED_QUERY,
    HEAD_DIM,
    KEYS_THEN_VALUES,
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
)
from qkov_lightning.heads.projections import Block, contiguous_heads
from qkov_lightning.heads.shapes import (
    ArchitectureError,
    child_of,
    config_of,
    declared_number,
    divide,
    first_of,
    how_to_register,
    is_linear,
    linear_children,
    linear_sizes,
    unknown,
)

HeadMap = Mapping[Block, tuple[str, Int[Tensor, "head feature"]]]
"""For each block: path of its module inside the attention module, and the features of each head."""


def resolve(name: str, path: str) -> str:
    """Dotted path of a module given relative to ``name``; each leading ``^.`` goes up by one."""
    while path.startswith("^."):
        name, path = name.rpartition(".")[0], path[2:]
    return f"{name}.{path}" if name and path else name or path


def placement_of(module: nn.Module) -> Callable[[nn.Module, str, nn.Module], HeadMap] | None:
    """How to place an attention module, if the names of its parts are known."""
    if is_linear(child_of(module, LATENT)):
        return place_latent
    for names in SEPARATE:
        if all(is_linear(child_of(module, child)) for child in names):
            return partial(_place_separate, names=names)
        if is_linear(child_of(module, names[0])) and getattr(module, BORROWS_KEYS_AND_VALUES, False):
            return partial(_place_separate, names=names[:1])
        # A model whose keys are its values has the name of the value projection, but no module there.
        if (
            all(is_linear(child_of(module, child)) for child in names[:2])
            and getattr(module, names[2], 0) is None
        ):
            return partial(_place_separate, names=names[:2])
    for query, both, classes in KEYS_THEN_VALUES:
        if all(is_linear(child_of(module, child)) for child in (query, both)) and follows(module, classes):
            return partial(_place_keys_then_values, query=query, both=both)
    for leaf, child in module.named_children():
        for place, classes in FUSED:
            if is_linear(child) and follows(module, classes, f".{leaf}"):
                return partial(_place_fused, leaf=leaf, place=place)
    return None


def _place_separate(model: nn.Module, name: str, module: nn.Module, names: tuple[str, ...]) -> HeadMap:
    rows_q, *rows_kv = (linear_sizes(module.get_submodule(child))[1] for child in names)
    heads = _num_heads(model, name, module)
    output = _output(model, name, module)
    head_dim = divide(name, names[0], rows_q, heads)
    declared = declared_number(model, name, module, HEAD_DIM)
    gated = follows(module, GATED_QUERY)
    if declared is not None and head_dim != declared * (2 if gated else 1):
        raise ArchitectureError(
            f"Attention `{name}` ({type(module).__name__}): `{names[0]}` has {rows_q} rows, expected {heads} heads x "
            f"{declared} = {heads * declared}. {how_to_register(module)}"
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
        kv_heads = _num_kv_heads(model, name, module, heads) or divide(name, names[1], rows_k, head_dim)
        if kv_heads * head_dim != rows_k or heads % kv_heads:
            raise ArchitectureError(
                f"Attention `{name}` ({type(module).__name__}): `{names[1]}` has {rows_k} rows, expected {kv_heads} "
                f"key-value heads x {head_dim} = {kv_heads * head_dim}, and {kv_heads} to divide the {heads} query "
                f"heads. {how_to_register(module)}"
            )
        if kv_heads not in (1, heads) and follows(module, TILED_GROUPS):
            raise ArchitectureError(
                f"Attention `{name}` ({type(module).__name__}): each of {kv_heads} key-value heads serves every "
                f"{kv_heads}th query head, expected {heads // kv_heads} query heads in a row. Use as many key-value "
                f"heads as query heads, or leave the keys and values out. {how_to_register(module)}"
            )
        head_map["K"] = (names[1], contiguous_heads(kv_heads, head_dim))
    if rows_kv[1:]:
        value_dim = divide(name, names[2], rows_kv[1], kv_heads)
        head_map["V"] = (names[2], contiguous_heads(kv_heads, value_dim))
    elif rows_kv:  # the values are the keys
        head_map["V"] = head_map["K"]
    head_map["O"] = (output, _output_heads(model, name, module, output, heads, value_dim))
    return head_map


def _place_keys_then_values(model: nn.Module, name: str, module: nn.Module, query: str, both: str) -> HeadMap:
    heads, output = _num_heads(model, name, module), _output(model, name, module)
    rows, rows_both = (linear_sizes(module.get_submodule(child))[1] for child in (query, both))
    head_dim = divide(name, query, rows, heads)
    if rows_both != 2 * rows:
        raise ArchitectureError(
            f"Attention `{name}` ({type(module).__name__}): `{both}` has {rows_both} rows, expected 2 x {heads} heads x "
            f"{head_dim} = {2 * rows}. {how_to_register(module)}"
        )
    keys, values = contiguous_heads(2 * heads, head_dim).split(heads)
    output_heads = _output_heads(model, name, module, output, heads, head_dim)
    queries = contiguous_heads(heads, head_dim)
    return {"Q": (query, queries), "K": (both, keys), "V": (both, values), "O": (output, output_heads)}


def place_packed(name: str, module: nn.MultiheadAttention) -> HeadMap:
    """The heads of PyTorch's own attention, which packs queries, keys and values into one weight.

    Raises:
        ArchitectureError: If it keeps three weights instead.
    """
    if module.in_proj_weight is None:
        raise ArchitectureError(
            f"Attention `{name}` (MultiheadAttention) has keys of size {module.kdim} and values of size {module.vdim}, "
            f"expected those of the queries, {module.embed_dim}: with other sizes PyTorch keeps three weights that "
            "belong to no module. Project keys and values to the size of the queries first. "
            + how_to_register(module)
        )
    query, key, value = in_blocks(module.num_heads, module.num_heads, module.head_dim)
    return {"Q": ("", query), "K": ("", key), "V": ("", value), "O": ("out_proj", query)}


def place_latent(model: nn.Module, name: str, module: nn.Module) -> HeadMap:
    """The heads of a latent attention (DeepSeek-V2, arXiv:2405.04434); keys and values share a projection.

    Raises:
        ArchitectureError: If a part is missing, or a size is not what the heads need.
    """
    heads = _num_heads(model, name, module)
    query = next((path for path in LATENT_QUERIES if is_linear(child_of(module, path))), None)
    sizes = [
        declared_number(model, name, module, (a,))
        for a in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    ]
    if query is None or None in sizes:
        raise ArchitectureError(f"{unknown(name, module)} {how_to_register(module)}")
    key_dim, rotary_dim, value_dim = (size or 0 for size in sizes)
    for path, head_dim in ((query, key_dim + rotary_dim), (LATENT, key_dim + value_dim)):
        rows = linear_sizes(module.get_submodule(path))[1]
        if rows != heads * head_dim:
            raise ArchitectureError(
                f"Attention `{name}` ({type(module).__name__}): `{path}` has {rows} rows, expected {heads} heads x "
                f"{head_dim} = {heads * head_dim}. {how_to_register(module)}"
            )
    output = _output(model, name, module)
    pieces = contiguous_heads(heads, key_dim + value_dim)
    return {
        "Q": (query, contiguous_heads(heads, key_dim + rotary_dim)),
        "K": (LATENT, pieces[:, :key_dim]),
        "V": (LATENT, pieces[:, key_dim:]),
        "O": (output, _output_heads(model, name, module, output, heads, value_dim)),
    }


def _place_fused(
    model: nn.Module,
    name: str,
    module: nn.Module,
    leaf: str,
    place: Placement,
) -> HeadMap:
    rows = linear_sizes(module.get_submodule(leaf))[1]
    heads = _num_heads(model, name, module)
    output = _output(model, name, module)
    head_dim = divide(name, output, linear_sizes(model.get_submodule(resolve(name, output)))[0], heads)
    output_heads = (output, contiguous_heads(heads, head_dim))
    if is_linear(child_of(module, "q_attn")) and rows == 2 * heads * head_dim:  # GPT-2 cross-attention
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
            + how_to_register(module)
        )
    query, key, value = place(heads, kv_heads, head_dim)
    return {"Q": (leaf, query), "K": (leaf, key), "V": (leaf, value), "O": output_heads}


def _output(model: nn.Module, name: str, module: nn.Module) -> str:
    """Path of the output projection: a child, or a sibling as in BERT (`self` and `output.dense`).

    Raises:
        ArchitectureError: If there is none.
    """
    for path in OUTPUT:
        if is_linear(child_of(module, path)):
            return path
    if name and is_linear(child_of(model.get_submodule(name.rpartition(".")[0]), "output.dense")):
        return "^.output.dense"
    raise ArchitectureError(
        f"Attention `{name}` ({type(module).__name__}) has no output projection: expected one of "
        f"{', '.join(OUTPUT)}; found {linear_children(module)}. {how_to_register(module)}"
    )


def _output_heads(
    model: nn.Module, name: str, module: nn.Module, output: str, heads: int, value_dim: int
) -> Tensor:
    columns = linear_sizes(model.get_submodule(resolve(name, output)))[0]
    if columns != heads * value_dim:
        raise ArchitectureError(
            f"Attention `{name}` ({type(module).__name__}): `{output}` has {columns} columns, expected {heads} heads x "
            f"{value_dim} (the size of a value head) = {heads * value_dim}. {how_to_register(module)}"
        )
    return contiguous_heads(heads, value_dim)


def _num_heads(model: nn.Module, name: str, module: nn.Module) -> int:
    heads = declared_number(model, name, module, NUM_HEADS)
    if heads is None:
        raise ArchitectureError(
            f"Attention `{name}` ({type(module).__name__}): the number of heads is unknown. Neither the module nor "
            f"the model's config has one of {', '.join(NUM_HEADS)}; found {linear_children(module)}. "
            + how_to_register(module)
        )
    return heads


def _num_kv_heads(model: nn.Module, name: str, module: nn.Module, heads: int) -> int | None:
    own = first_of(module, NUM_KV_HEADS)
    group = first_of(module, QUERY_GROUP)
    if own is None and group:
        return heads // group
    config = config_of(model, name)
    # Encoder and decoder may share a config that counts the heads of one of them only.
    return (
        first_of(config, NUM_KV_HEADS)
        if own is None and first_of(config, NUM_HEADS) in (heads, None)
        else own
    )


def is_linear_attention(module: nn.Module) -> bool:
    """Whether it is a recurrent or linear attention, which has no softmax over tokens."""
    return any(hasattr(module, part) for part in NOT_SOFTMAX) or follows(module, LINEAR_ATTENTION)
