"""What a model says of its attention: sizes of linear modules, numbers in a config, words of a refusal."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from qkov_lightning.heads.conventions import FUSED_NAMES, NUM_HEADS, OUTPUT


class ArchitectureError(ValueError):
    """An attention layer cannot be placed with certainty."""


def declared_number(
    model: nn.Module, name: str, module: nn.Module, attributes: tuple[str, ...]
) -> int | None:
    """A number that the attention module says of itself, else the config of the nearest module around it."""
    own = first_of(module, attributes)
    return first_of(config_of(model, name), attributes) if own is None else own


def config_of(model: nn.Module, name: str) -> object:
    """The config of a module, or of the nearest module around it that has one."""
    while True:
        config = getattr(model.get_submodule(name), "config", None)
        if config is not None or not name:
            return config
        name = name.rpartition(".")[0]


def first_of(holder: object, attributes: tuple[str, ...]) -> int | None:
    """The first of the attributes that the holder has as a whole number."""
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


def divide(name: str, path: str, features: int, parts: int) -> int:
    """Size of each of some equal parts.

    Raises:
        ArchitectureError: If they do not come out equal.
    """
    if features % parts:
        raise ArchitectureError(
            f"Attention `{name}`: the {features} features of `{path}` do not divide into {parts} equal parts. "
            "Check the number of heads in the model's config."
        )
    return features // parts


def child_of(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a dotted path; None if there is none."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def is_linear(module: nn.Module | None) -> bool:
    """Whether a module is a linear map: ``nn.Linear``, a wrapper of one, or the ``Conv1D`` of GPT-2."""
    if module is None:
        return False
    weight = getattr(module, "weight", None)
    return hasattr(module, "in_features") or (
        isinstance(weight, Tensor) and weight.ndim == 2 and hasattr(module, "nf")
    )


def is_pointwise_convolution(module: nn.Module | None) -> bool:
    """Whether a module is a convolution of size 1: a linear map of the channels at each place."""
    return isinstance(module, nn.Conv1d | nn.Conv2d) and (
        set(module.kernel_size) == {1}
        and set(module.stride) == {1}
        and module.padding in (0, (0,), (0, 0), "valid", "same")
        and module.groups == 1
    )


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """Input and output features of a linear module, whatever the layout of its weight."""
    if is_pointwise_convolution(module):
        return int(module.in_channels), int(module.out_channels)  # type: ignore[arg-type]
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    inputs, outputs = module.get_parameter("weight").shape  # Conv1D of GPT-2: inputs first
    return inputs, outputs


def linear_children(module: nn.Module) -> str:
    """The linear modules inside a module with their sizes, for a message."""
    found = [
        f"`{name}` {linear_sizes(child)}"
        for name, child in module.named_modules()
        if name and is_linear(child)
    ]
    return ", ".join(found) + " (inputs, outputs)" if found else "no linear module"


def unknown(name: str, module: nn.Module, what: str = "an unknown layout") -> str:
    """What is wrong with an attention module, and what was found inside it, for a message."""
    return (
        f"Attention `{name}` ({type(module).__module__}.{type(module).__name__}) has {what}; found "
        f"{linear_children(module)}."
    )


def how_to_register(module: nn.Module) -> str:
    """The line to write: complete for one fused projection and an output, else with places to fill in."""
    heads = first_of(module, NUM_HEADS)
    linear = {
        name: linear_sizes(child) for name, child in module.named_modules() if name and is_linear(child)
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
