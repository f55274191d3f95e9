r"""The subspace in which a task uses the weights of a model: the leading directions of their inputs.

A linear map :math:`y = W x` gives the same outputs for all inputs in the span of U as long as its changes
have no part in it, :math:`\Delta W\, U = 0` (gradient projection memory, Saha et al. 2021,
arXiv:2103.09762). Here the subspace is one of the inputs alone: it takes as many numbers as directions times
inputs, whereas the span of the task's gradients takes as many as directions times weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qkov_lightning.capture.reading import in_float64
from qkov_lightning.capture.rehearsal import Loss, rehearsing, to_device, training_loss
from qkov_lightning.heads.finding import find_projections
from qkov_lightning.heads.maps import find_map
from qkov_lightning.heads.projections import Projection
from qkov_lightning.heads.shapes import is_linear
from qkov_lightning.heads.watching import MapWatcher, Product, on_call
from qkov_lightning.store.files import write_durably

SCHEMA_VERSION = 1

Rest = Literal["leave", "tensors"]
"""Whether the weights outside of the heads are protected, too."""


class SubspaceError(ValueError):
    """A file holds no subspace, or one of another model."""


@dataclass(frozen=True, eq=False)
class ProtectedSubspace:
    """What must not change for the tasks that it was measured on.

    Attributes:
        bases: Orthonormal directions of the inputs of each linear module, by its name. An output projection
            has a basis for the features of each head, other modules have one for all of their inputs.
            Columns of zeros fill up bases that have fewer directions.
        tokens: Rows of each embedding that the tasks use.
        num_samples: Batch rows that it was measured on.
    """

    bases: Mapping[str, Float[Tensor, "part input direction"]]
    tokens: Mapping[str, Int[Tensor, row]]
    num_samples: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all directions."""
        return sum(tensor.nbytes for tensor in (*self.bases.values(), *self.tokens.values()))

    def state_dict(self) -> dict[str, Any]:
        """The contents, as tensors and plain values."""
        return {"bases": dict(self.bases), "tokens": dict(self.tokens), "num_samples": self.num_samples}

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, completely or not at all: it holds no sample of the tasks."""
        tensors = {f"basis/{name}": basis.contiguous() for name, basis in self.bases.items()}
        tensors |= {f"tokens/{name}": rows.contiguous() for name, rows in self.tokens.items()}
        header = {"schema": SCHEMA_VERSION, "num_samples": self.num_samples}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_durably(Path(path), tensors, {"qkov_subspace": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> ProtectedSubspace:
        """Read what ``save`` wrote.

        Raises:
            SubspaceError: If the file holds something else.
            FileNotFoundError: If there is no such file.
        """
        if not Path(path).exists():
            raise FileNotFoundError(f"There is no file {path}: measure it with `qkov protect`.")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["qkov_subspace"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
        except (SafetensorError, KeyError, ValueError) as error:
            raise SubspaceError(f"{path} holds no subspace of `qkov protect`: {error}") from error
        if header["schema"] != SCHEMA_VERSION:
            raise SubspaceError(f"{path} has schema {header['schema']}, expected {SCHEMA_VERSION}.")
        parts: dict[str, dict[str, Tensor]] = {"basis": {}, "tokens": {}}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            parts[kind][name] = tensor
        return cls(parts["basis"], parts["tokens"], int(header["num_samples"]))


def measure_subspace(
    model: nn.Module,
    probe: Iterable[Any],
    *,
    rank: int | float = 0.5,
    rest: Rest = "leave",
    loss: Loss | None = None,
    projections: Sequence[Projection] | None = None,
) -> ProtectedSubspace:
    """Measure where the samples of a probe use the weights of the heads, in evaluation mode.

    One forward pass over the probe; nothing of the model changes. Tokens that the batch's ``attention_mask``
    leaves out do not count.

    Args:
        model: Holds the heads.
        probe: Batches of the tasks to protect.
        rank: Directions of each module's inputs (of each head, for an output projection): their number, or,
            between 0 and 1, their share of the inputs.
        rest: "tensors" also measures the inputs of all other linear modules, and which rows of embeddings the
            samples use.
        loss: Runs the model on a batch; the ``training_step`` of a LightningModule without it.
        projections: Head map; found by ``find_projections`` by default.

    Returns:
        The subspace.

    Raises:
        ValueError: If the probe is empty, the rank is no number or share of directions, or a module of a head
            did not run.
    """
    check_rank(rank)
    run = loss or training_loss(model)
    placed = list(projections or find_projections(model))
    device = next(model.parameters()).device
    parts = {part.name: part for p in placed for part in find_map(model, p).parts}
    outputs = {p.module_name: p for p in placed if p.block == "O"}
    called = [name for name, part in parts.items() if part.container is None]
    if rest == "tensors":
        called += [name for name, module in model.named_modules() if is_linear(module) and name not in parts]
    moments = _Moments()
    num_samples = 0
    with ExitStack() as stack:
        stack.enter_context(rehearsing(model, evaluation=True))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_watching(model, called, {*parts} - {*called}, moments))
        for batch in probe:
            batch = to_device(model, batch, device)
            moments.mask = _mask(batch)
            run(model, batch)
            num_samples += moments.rows
            moments.rows = 0
    missing = [name for name in parts if name not in moments.squares]
    if missing or not num_samples:
        raise ValueError(
            f"The probe did not run {', '.join(f'`{name}`' for name in missing) or 'any module'}: expected batches that "
            "pass through every head, in evaluation mode."
        )
    bases = {}
    for name, square in moments.squares.items():
        own_inputs = outputs[name].head_features if name in outputs else torch.arange(len(square))[None]
        bases[name] = torch.stack([
            _leading(square[own][:, own], rank) for own in own_inputs.to(square.device)
        ])
    tokens = (
        {name: count.nonzero().flatten() for name, count in moments.counts.items()}
        if rest == "tensors"
        else {}
    )
    return ProtectedSubspace(
        {name: basis.float().cpu() for name, basis in bases.items()},
        {name: rows.cpu() for name, rows in tokens.items()},
        num_samples,
    )


def check_rank(rank: int | float) -> None:
    """Refuse what is neither a number of directions nor a share of them.

    Raises:
        ValueError: If it is not.
    """
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if not (whole or (isinstance(rank, float) and 0 < rank <= 1)):
        raise ValueError(
            f"rank is {rank!r}, expected a number of directions (a whole number of at least 1) or a share of the inputs "
            "(between 0 and 1, as in 0.5)."
        )


def _leading(square: Float[Tensor, "input input"], rank: int | float) -> Float[Tensor, "input direction"]:
    """The directions that hold most of the inputs, as columns; zeros where there are no inputs at all."""
    count = min(len(square), rank) if isinstance(rank, int) else max(1, round(rank * len(square)))
    values, vectors = torch.linalg.eigh(square)
    present = values > values.max().clamp(min=0) * len(square) * torch.finfo(values.dtype).eps
    return (vectors * present).flip(-1)[:, :count]


class _Moments:
    """Sums over tokens, module by module."""

    def __init__(self) -> None:
        self.squares: dict[str, Float[Tensor, "input input"]] = {}
        self.counts: dict[str, Int[Tensor, row]] = {}
        self.mask: Tensor | None = None
        self.rows = 0

    def add_inputs(self, name: str, inputs: Float[Tensor, "*token input"]) -> None:
        self.rows = max(self.rows, len(inputs))
        if self.mask is not None and self.mask.shape == inputs.shape[:-1]:
            inputs = inputs[self.mask]
        flat = inputs.reshape(-1, inputs.shape[-1]).float()
        square = in_float64(flat.T @ flat)
        self.squares[name] = self.squares[name] + square if name in self.squares else square

    def add_rows(self, name: str, num_rows: int, rows: Int[Tensor, "*token"]) -> None:
        count = torch.bincount(rows.flatten(), minlength=num_rows)
        self.counts[name] = self.counts[name] + count if name in self.counts else count


def _mask(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


@contextmanager
def _watching(
    model: nn.Module, called: Sequence[str], uncalled: set[str], moments: _Moments
) -> Iterator[None]:
    """See the inputs of linear maps, and the rows that embeddings are asked for."""
    packed = {name for name, one in model.named_modules() if isinstance(one, nn.MultiheadAttention)}
    inside = {*packed, *(f"{name}.out_proj" if name else "out_proj" for name in packed)}
    uncalled = uncalled | inside

    def on_products(products: Sequence[Product]) -> list[Tensor | None]:
        for product in products:
            for name in dict.fromkeys(piece.name for piece in product.pieces):
                moments.add_inputs(name, product.activation)
        return [None] * len(products)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name in called and name not in inside:
                hook = on_call(name, module, on_products)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            if isinstance(module, nn.Embedding):
                see = _hook(partial(moments.add_rows, name, len(module.weight)))
                stack.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
        if uncalled:
            stack.enter_context(MapWatcher(model, on_products, uncalled))
        yield


def _hook(see: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        see(args[0] if args else next(iter(kwargs.values())))

    return hook
