"""Proof on a user's model and batch that captured gradients are right, or the reason why they are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qkov_lightning.capture.autograd_comparison import AutogradComparison, CaptureVerification, Comparison
from qkov_lightning.capture.reductions import ReductionChoice
from qkov_lightning.capture.rehearsal import Loss, rehearsing, to_device, training_loss
from qkov_lightning.heads.finding import find_projections
from qkov_lightning.heads.projections import Projection


def verify_capture(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    loss_reduction: ReductionChoice = "auto",
    num_target_tokens_of: str | Callable[[Any], Any] = "num_target_tokens",
    sample_of: Callable[[Any, int], Any] | None = None,
    projections: Sequence[Projection] | None = None,
    tolerance: float | None = None,
) -> CaptureVerification:
    r"""Compare captured gradients with autograd on a batch of one, per sample, projection and head.

    The model runs in the modes that its modules are in, and under the autocast that surrounds the call. The
    error of a cell is, with the captured gradient g and the gradient :math:`\hat g` of the sample alone,

    .. math:: \max_n \lVert g_n - \hat g_n \rVert \Big/
              \max(\lVert \hat g_n \rVert, 10^{-3} \lVert \hat G_n \rVert)

    where :math:`\hat G_n` holds all cells. If some cell fails, the reasons that can be found are named:
    dropout and other random numbers, batch norm, a wrong ``loss_reduction``, weights that two modules share.

    Args:
        model: Left as found, with its random numbers.
        batch: As the training loop gives it to the model. A few samples are enough.
        loss: Loss of the model on a batch; the ``training_step`` of a LightningModule without it.
        loss_reduction: What the monitor is told about how the loss joins its samples.
        num_target_tokens_of: Batch key, or function of the batch, that gives the target tokens of each
            sample; only "token_mean" needs it.
        sample_of: Gives sample n of the batch as a batch of one, where cutting everything that has one entry
            per sample is not right (time first, packed sequences).
        projections: Head map; found by ``find_projections`` by default.
        tolerance: Largest relative error that passes; the square root of the machine precision, half of the
            digits, of the coarsest type in use by default. Rounding is far below it, a wrong factor far
            above.

    Returns:
        The error of every cell, and the reasons.

    Raises:
        ValueError: If there is no loss to call, no projection trains, the loss is no finite number, or
            samples cannot be told apart.
    """
    placed = find_projections(model) if projections is None else list(projections)
    step_loss = loss or training_loss(model)
    with rehearsing(model, evaluation=False), torch.enable_grad():
        batch = to_device(model, batch, next(model.parameters()).device)
        check = AutogradComparison(
            model, batch, step_loss, loss_reduction, num_target_tokens_of, sample_of, placed
        )
        comparison = check.compare()
        if tolerance is None:
            tolerance = max(torch.finfo(dtype).eps for dtype in comparison.dtypes) ** 0.5
        verification = comparison.verification(placed, tolerance)
        reasons = comparison.problems if verification.passed else _reasons(check, comparison, tolerance)
        return replace(verification, reasons=tuple(reasons))


def _reasons(check: AutogradComparison, comparison: Comparison, tolerance: float) -> Iterator[str]:
    yield from comparison.problems
    random, joining = _modules_that_draw(check), check.joins_samples()
    for name in random:
        yield f"{_named(check, name)} draws random numbers, as dropout does: a batch of one draws others."
    for name in joining:
        yield (
            f"{_named(check, name)} normalises over the batch: the gradient of a sample depends on the other samples, and the "
            "captured one holds their share."
        )
    if random or joining:
        with _evaluating(check, {*random, *joining}):
            comparison = check.compare()
        remaining = len(comparison.verification(check.projections, tolerance).failures)
        if not remaining:
            yield "With these modules in evaluation mode every cell agrees: they are the reason."
            return
        yield f"With these modules in evaluation mode {remaining} cells still differ."
    further = [
        *_missing(comparison),
        *_wrong_reduction(check, comparison, tolerance),
        *_shared_weights(check, comparison, tolerance),
    ]
    yield from further
    if not (further or comparison.problems):
        yield (
            "No reason was found. Does the loss compare samples with each other, or does a batch of one go another way through "
            "the model? `sample_of` says how to cut the batch."
        )


def _named(check: AutogradComparison, name: str) -> str:
    module = check.model.get_submodule(name)
    return (
        f"`{name}` ({type(module).__name__})"
        if name
        else f"The forward pass of {type(module).__name__} itself"
    )


def _modules_that_draw(check: AutogradComparison) -> list[str]:
    """The innermost modules whose forward pass moves the random numbers on."""
    drawn: list[str] = []
    entered: list[tuple[list[Tensor], int]] = []

    def enter(*_: object) -> None:
        entered.append((_random_states(), len(drawn)))

    def leave(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            before, count = entered.pop()
            if _moved_on(before) and len(drawn) == count:
                drawn.append(name)

        return hook

    handles: list[Any] = []
    torch.manual_seed(0)  # as at the start of each run of the loss
    start = _random_states()
    try:
        for name, module in check.model.named_modules():
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave(name), always_call=True))
        check.run(check.batch)
    finally:
        for handle in handles:
            handle.remove()
    if _moved_on(start) and not drawn:
        drawn.append("")
    return list(dict.fromkeys(drawn))


def _random_states() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]


def _moved_on(before: list[Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before, _random_states(), strict=True))


@contextmanager
def _evaluating(check: AutogradComparison, names: set[str]) -> Iterator[None]:
    """Evaluation mode of some modules, but not of those inside them."""
    modes = {name: check.model.get_submodule(name).training for name in names}
    try:
        for name in names:
            check.model.get_submodule(name).training = False
        yield
    finally:
        for name, mode in modes.items():
            check.model.get_submodule(name).training = mode


def _missing(comparison: Comparison) -> Iterator[str]:
    captured, expected = comparison.captured.sum(dim=0), comparison.expected.sum(dim=0)
    lost = {
        p.module_name
        for (p, _), f, e in zip(comparison.cells, captured, expected, strict=True)
        if e > 0 and f == 0
    }
    for name in sorted(lost):
        yield f"`{name}` delivered nothing, though its weight has a gradient: is the weight used without calling the module?"


def _wrong_reduction(check: AutogradComparison, comparison: Comparison, tolerance: float) -> Iterator[str]:
    factors = comparison.factors(tolerance)
    near = 10 * tolerance
    if factors is None or not len(factors) or bool(((factors - 1).abs() <= tolerance).all()):
        return
    least, most = float(factors.min()), float(factors.max())
    constant = most - least <= near * abs(most)
    text = f"Every gradient is too large by a factor of {least:.4g}" + (
        "" if constant else f" to {most:.4g}, one per sample"
    )
    declared = f'not what loss_reduction="{check.loss_reduction}" says'
    # The share that a sample has in the loss: what was undone is its inverse, times the factor that is too
    # much.
    shares = factors / comparison.undone[comparison.expected.sum(dim=1) > 0]
    if check.loss_reduction == "token_mean":
        yield f"{text}: the loss weighs its samples otherwise than by the numbers of target tokens that were given."
    elif bool(((shares - 1).abs() <= near).all()):
        yield f'{text}: the loss is a sum over samples, {declared}. Say loss_reduction="sum".'
    elif constant and abs(float(shares.sum()) - 1) <= near:
        yield f'{text}: the loss is a mean over samples, {declared}. Say loss_reduction="mean".'
    elif abs(float(shares.sum()) - 1) <= near:
        yield (
            f"{text}: the loss is a weighted mean over samples, {declared}. If it is a mean over tokens, say "
            'loss_reduction="token_mean".'
        )
    else:
        yield f"{text}: is the loss multiplied with something that a batch of one does not have?"


def _shared_weights(check: AutogradComparison, comparison: Comparison, tolerance: float) -> Iterator[str]:
    failures = comparison.verification(check.projections, tolerance).failures
    for name in dict.fromkeys(cell.projection.module_name for cell in failures):
        own = check.maps[name]
        weights = {id(p) for p in own.parameters if p.ndim > 1}
        for other, module in check.model.named_modules():
            parts = {part.name.removesuffix(".weight") for part in own.parts}
            held = {id(p) for p in module._parameters.values() if p is not None}
            if other not in {name, *parts} and weights & held and all(part.module for part in own.parts):
                yield (
                    f"`{name}` shares its weight with `{other}`: captured is the gradient of its own use of it, autograd sees "
                    "both."
                )
