"""What taps deliver, joined into factors: the tokens of every sample, without what adds nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qkov_lightning.capture.reading import read_together
from qkov_lightning.capture.samples import Labels, Samples


@dataclass(frozen=True, eq=False)
class GradientFactors:
    """What the per-sample gradients of a linear module are made of.

    Attributes:
        activation: Input of the module at each token.
        grad_output: Gradient of the loss with respect to the output at each token.
        offsets: Tokens ``offsets[n]:offsets[n + 1]`` belong to sample n.
    """

    activation: Float[Tensor, "token d_in"]
    grad_output: Float[Tensor, "token d_out"]
    offsets: Int[Tensor, edge]


@dataclass(frozen=True, eq=False)
class CapturedStep:
    """What was captured from one forward pass, and its backward passes, of a training step.

    Attributes:
        samples: Who the samples are.
        scales: Factor per sample that turns its captured gradient into that of its own loss.
        num_terms: Terms (target tokens) that the own loss of each sample is the mean of; 1 if it is their
            sum.
        factors: Factors by module name. Modules that share an input share the activation tensor.
    """

    samples: Samples
    scales: Float[Tensor, sample]
    num_terms: Float[Tensor, sample]
    factors: dict[str, GradientFactors]

    @property
    def is_finite(self) -> bool:
        """Whether no factor has a NaN or an infinity (an overflow under mixed precision, say)."""
        tensors = {id(t): t for f in self.factors.values() for t in (f.activation, f.grad_output)}
        return all(
            map(bool, read_together([_is_finite(t) for t in (self.scales[:, None], *tensors.values())]))
        )


class Scale:
    """A number, or a function that is called when the number is needed, and once only.

    An accelerator may not know it yet.
    """

    def __init__(self, value: float | Callable[[], float]) -> None:
        self._value = value

    def __float__(self) -> float:
        if callable(self._value):
            self._value = self._value()
        return self._value


@dataclass(frozen=True, eq=False)
class Delivery:
    """What one backward pass gives to a tap.

    The input of a module, the gradient of its output, and its scale.

    Attributes:
        activation: Input of the module.
        grad_output: Gradient of its output.
        scale: Undoes what the training loop did to the loss.
        adds_up: Whether the backward pass added to ``.grad``.
    """

    activation: Tensor
    grad_output: Tensor
    scale: Scale
    adds_up: bool = True


def fits(delivery: Delivery, num_samples: int, labels: Labels) -> bool:
    """Whether the tokens of an input can be told apart by sample."""
    shape = delivery.activation.shape
    if labels.token_samples is not None:
        return shape[:-1].numel() == labels.token_samples.numel()
    return len(shape) >= 2 and shape[0] == num_samples


def inputs_of(deliveries: list[Delivery]) -> tuple[object, ...]:
    """What identifies the inputs of a module: Q, K and V usually read one tensor."""
    tensors = (delivery.activation for delivery in deliveries)
    return (deliveries[0].grad_output.dtype, *((t.data_ptr(), t.shape, t.stride()) for t in tensors))


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """Which tokens of some calls are kept, sample by sample, and where the samples lie.

    Attributes:
        order: The tokens, as indices.
        offsets: Tokens ``order[offsets[n]:offsets[n + 1]]`` belong to sample n.
    """

    order: Int[Tensor, token]
    offsets: Int[Tensor, edge]


def token_orders(
    sharing: Sequence[Mapping[str, Sequence[Delivery]]], num_samples: int, token_samples: Tensor | None
) -> list[TokenOrder]:
    """Which tokens are kept, for each set of modules with the same inputs.

    Tokens whose output gradients are all zero (padding) are dropped, which is lossless. How many there are
    only the device knows: it is asked once for all modules.
    """
    kept = []
    for modules in sharing:
        per_module = [
            torch.cat([_is_nonzero(call.grad_output.flatten(0, -2)) for call in own])
            for own in modules.values()
        ]
        kept.append(torch.stack(per_module).any(dim=0))
    packed = None if token_samples is None else token_samples.flatten().cpu()
    return [
        _order(keep, next(iter(modules.values())), num_samples, packed)
        for keep, modules in zip(read_together(kept), sharing, strict=True)
    ]


def _order(
    keep: Tensor, calls: Sequence[Delivery], num_samples: int, token_samples: Tensor | None
) -> TokenOrder:
    sample = torch.cat([_sample_of_token(call, num_samples, token_samples) for call in calls])
    order = (keep & (sample >= 0)).nonzero().flatten()
    order = order[sample[order].argsort(stable=True)]
    offsets = torch.zeros(num_samples + 1, dtype=torch.int64)
    offsets[1:] = torch.bincount(sample[order], minlength=num_samples).cumsum(0)
    return TokenOrder(order, offsets)


def join(
    modules: Mapping[str, Sequence[Delivery]], tokens: TokenOrder, scale: float
) -> dict[str, GradientFactors]:
    """Factors of modules with the same inputs: the tokens of all their calls, sample by sample."""
    calls = next(iter(modules.values()))
    # Autocast computed the weight gradient from the activation in the precision of the output.
    dtype = calls[0].grad_output.dtype
    activation = _tokens([call.activation for call in calls]).to(dtype)
    grads = {name: _tokens([_rescaled(call, scale) for call in own]) for name, own in modules.items()}
    order = tokens.order.to(activation.device, non_blocking=True)
    # Always a copy, even of all tokens in order: the tensors of the model may be overwritten any time.
    activation = activation.index_select(0, order)
    return {
        name: GradientFactors(activation, grad.index_select(0, order), tokens.offsets)
        for name, grad in grads.items()
    }


def _tokens(calls: list[Tensor]) -> Tensor:
    """The tokens of all calls of a module; of the usual single call without a copy."""
    flat = [call.flatten(0, -2) for call in calls]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _is_nonzero(tokens: Tensor) -> Tensor:
    """Whether a token has any feature that is not zero.

    From the extremes, like ``_is_finite``: they write nothing of the size of the input, and NaN survives
    them.
    """
    return (tokens.amax(dim=1) != 0) | (tokens.amin(dim=1) != 0)


def _is_finite(tokens: Tensor) -> Tensor:
    """Whether all are finite, as one truth value where the tokens are."""
    return (tokens.amax(dim=1).isfinite() & tokens.amin(dim=1).isfinite()).all()


def _sample_of_token(call: Delivery, num_samples: int, token_samples: Tensor | None) -> Tensor:
    if token_samples is not None:
        return token_samples
    tokens_per_sample = call.activation.shape[:-1].numel() // num_samples
    return torch.arange(num_samples).repeat_interleave(tokens_per_sample)


def _rescaled(call: Delivery, scale: float) -> Tensor:
    """The output gradient, in the scale that the step as a whole undoes."""
    if float(call.scale) == scale:
        return call.grad_output
    dtype = torch.promote_types(call.grad_output.dtype, torch.float32)
    return call.grad_output.to(dtype) * (float(call.scale) / scale)
