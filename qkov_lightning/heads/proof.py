"""Names propose, derivatives prove: the head map that a model has, and how each layer of it is known."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from qkov_lightning.heads.architectures import named_projections
from qkov_lightning.heads.discovery import Run
from qkov_lightning.heads.finding import find_projections
from qkov_lightning.heads.projections import Projection
from qkov_lightning.heads.shapes import ArchitectureError
from qkov_lightning.heads.verification import Verification, verify_projections

PROVEN = "proven"
"""How a layer is known whose every head was proven."""

FOUND = "found and proven"
"""The same of a layer that derivatives found, not names."""

VISIBLE = ("eager", "sdpa")
"""Attention of transformers whose softmax can be seen."""


class HeadMapWarning(UserWarning):
    """Names place heads wrongly; the map that was found goes on instead."""


def prove_projections(
    model: nn.Module, run: Run, projections: Sequence[Projection] | None = None
) -> list[Projection]:
    """The head map of a model, each layer with how it is known.

    Args:
        model: Left as found.
        run: Runs it on a sample.
        projections: The map to prove; by default that of the names, and where it is wrong or there is none,
            the one that derivatives find.

    Returns:
        The map. A layer that did not run, or not in view, is still "by name", and says why.

    Raises:
        ArchitectureError: If a slice is another head than it is said to be, and no right map was found.

    Warns:
        HeadMapWarning: If names were wrong.
    """
    named, reason = list(projections or []), ""
    if projections is None:
        try:
            named = named_projections(model)
        except ArchitectureError as error:
            reason = str(error)
    verification = _verified(model, run, named) if named else None
    wrong = [] if verification is None else [cell for cell in verification.cells if cell.is_wrong]
    if verification is not None and not wrong:
        return _labelled(named, verification)
    if wrong:
        cells = "; ".join(map(str, wrong[:3])) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        reason = f"The heads are not where {'the head map' if projections else 'the names'} say: {cells}."
    if projections is not None:
        raise ArchitectureError(f"{reason} `find_projections(model, batch)` finds them from derivatives.")
    try:
        with visible_attention(model):
            found = find_projections(model, (), forward=lambda _: run())
    except ArchitectureError as error:
        raise ArchitectureError(f"{reason} {error}") from error
    if wrong:
        warnings.warn(f"{reason} Goes on with the map that derivatives find.", HeadMapWarning, stacklevel=2)
    return [replace(projection, placed=FOUND) for projection in found]


def _verified(model: nn.Module, run: Run, projections: Sequence[Projection]) -> Verification:
    """A verification, once more with kernels that can be seen where some were not."""
    verification = verify_projections(model, None, projections, forward=lambda _: run())
    if all(cell.problem is None or cell.is_wrong for cell in verification.cells):
        return verification
    with visible_attention(model) as has_changed:
        return (
            verify_projections(model, None, projections, forward=lambda _: run())
            if has_changed
            else verification
        )


def _labelled(projections: Sequence[Projection], verification: Verification) -> list[Projection]:
    problems: dict[int, str] = {}
    for cell in verification.failures:
        problems.setdefault(cell.projection.layer, str(cell.problem))
    return [
        replace(p, placed=f"by name, not provable: {problems[p.layer]}" if p.layer in problems else PROVEN)
        for p in projections
    ]


@contextlib.contextmanager
def visible_attention(model: nn.Module) -> Iterator[bool]:
    """Models of transformers run without kernels that hide their softmax; says whether there are any."""
    hidden: list[tuple[object, str]] = []
    for module in model.modules():
        config = getattr(module, "config", None)
        kernel = getattr(config, "_attn_implementation", None)
        if (
            isinstance(kernel, str)
            and kernel not in VISIBLE
            and not any(config is known for known, _ in hidden)
        ):
            hidden.append((config, kernel))
    try:
        for config, _ in hidden:
            config._attn_implementation = "eager"  # type: ignore[attr-defined]
        yield bool(hidden)
    finally:
        for config, kernel in hidden:
            config._attn_implementation = kernel  # type: ignore[attr-defined]
