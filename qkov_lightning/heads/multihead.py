"""Sight of the linear maps inside ``torch.nn.MultiheadAttention``, which calls no submodule.

It hands its weights to one function; the query, key and value weights are parts of one packed parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

OnLinear = Callable[[str, int, Tensor, Tensor], Tensor]
"""Takes a module's name, the first row of its weight that was used, the input and the output (sample first);
gives the output to go on with."""

# The same code, but visible to a mode: the original hands itself over to the mode as a whole, once and again.
_attention = functional.multi_head_attention_forward
_open_attention = FunctionType(
    _attention.__code__,
    {**vars(functional), "has_torch_function": lambda _: False},
    argdefs=_attention.__defaults__,
)


class MultiheadLinears(TorchFunctionMode):
    """While active, shows the linear maps of some ``nn.MultiheadAttention``.

    The packed query, key and value weight goes by the name of the attention module, the output projection by
    its own. An active mode also keeps PyTorch from taking its fused inference path.

    Args:
        modules: The attention modules by name.
        on_linear: Called for each linear map.
    """

    def __init__(self, modules: Mapping[str, nn.MultiheadAttention], on_linear: OnLinear) -> None:
        super().__init__()
        self._names: list[tuple[Tensor, str]] = []
        for name, module in modules.items():
            if module.in_proj_weight is not None:
                self._names.append((module.in_proj_weight, name))
            self._names.append((module.out_proj.weight, f"{name}.out_proj" if name else "out_proj"))
        self._on_linear = on_linear
        self._num_samples = 1

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward:
            query: Tensor = args[0]
            self._num_samples = query.shape[1] if query.ndim == 3 else 1
            with self:
                return _open_attention(*args, **kwargs)
        output = func(*args, **kwargs)
        if func is functional.linear:
            return self._linear(output, *_arguments(args, kwargs))
        return output

    def _linear(self, output: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        for packed, name in self._names:
            start = (weight.data_ptr() - packed.data_ptr()) // weight.element_size()
            if weight.shape[-1] == packed.shape[-1] and 0 <= start < packed.numel():
                # The function works time first, and flattens time and samples before its output projection.
                activation = input.reshape(-1, self._num_samples, input.shape[-1]).transpose(0, 1)
                features = output.reshape(-1, self._num_samples, output.shape[-1]).transpose(0, 1)
                seen = self._on_linear(name, start // packed.shape[-1], activation, features)
                return seen.transpose(0, 1).reshape(output.shape).contiguous()
        return output


def _arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Input and weight of a call of ``functional.linear``, by position or by name."""
    input, weight, *_ = (*args, *(kwargs[name] for name in ("input", "weight")[len(args) :]))
    return input, weight
