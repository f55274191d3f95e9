"""The Lightning callback that keeps what a task has learned while others train."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from qkov_lightning.capture.first_batch import Verify, place_heads
from qkov_lightning.heads.projected import ProjectedWeight, SubspaceRule
from qkov_lightning.heads.projections import BLOCKS, Projection, num_heads, num_layers
from qkov_lightning.heads.shapes import is_linear
from qkov_lightning.heads.slices import FrozenSlice
from qkov_lightning.heads.weights import find_weight
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.measure.subspace import (
    ProtectedSubspace,
    Rest,
    SubspaceError,
    check_rank,
    measure_subspace,
)
from qkov_lightning.stepping import CELL, StepCallback, nothing_sure, worst_cells
from qkov_lightning.views.facets import Scale
from qkov_lightning.views.figures import cells_figure
from qkov_lightning.views.loggers import send
from qkov_lightning.views.page import render
from qkov_lightning.views.publication import Publication
from qkov_lightning.views.runs import find_latest


class HeadProjector(StepCallback):
    r"""Protects what tasks have learned: takes out of every step its part in the subspace that they use.

    After each optimiser step the change of every protected cell loses its component along the leading
    directions of the protected tasks' inputs, :math:`\Delta W \leftarrow \Delta W (I - U U^\top)` (Saha et
    al. 2021, arXiv:2103.09762, who project gradients; an optimiser rescales these, and decays weights). The
    outputs of the cell for inputs in the span of U then stay as they were. The data of the protected tasks
    are not needed while others train.

    Of Q, K and V, the directions are those of the module's inputs, and the entries of the bias that belong to
    a protected head are held. Of O, each head has directions of its own, those of its context; the bias is
    held if all heads of the layer are protected.

    Args:
        protect: File of ``qkov protect``, or batches of the tasks to protect, which are measured when
            training starts.
        rank: For batches: directions of each module's inputs, as a number or as a share of the inputs. More
            protect better, and leave less room to learn. See :func:`~qkov_lightning.measure_subspace`.
        cells: "all"; names of cells, as in ``["L15.H8.O"]``; or a number: so many of the heatmap's cells at
            most, the worst of those that surely hurt a task.
        heatmap: Heatmap file, or folder of a run, for a number of cells.
        pair: Task pair of the heatmap that they are chosen for, ``<task_a>__<task_b>``; all pairs by default.
        every_n_epochs: For batches: measure them again at the start of every n-th epoch, at the weights of
            that time; once by default.
        rest: "leave" protects attention heads alone. "tensors" protects all other weights that train, too:
            linear modules by the directions of their inputs; of embeddings, the rows that the tasks use are
            held; everything else (gains and biases, positions) is held as a whole.
        projections: Head map; by default the one that names give, or derivatives where names are wrong or
            unknown.
        verify: "first_batch" proves the head map on the first sample of the first batch, "off" leaves that
            out; see :class:`~qkov_lightning.InterferenceMonitor`.

    Raises:
        ValueError: If an argument is out of range, or a name is no cell; at the start of training, if the
            file or the heatmap is of another model, or no cell of the heatmap surely hurts.
        ArchitectureError: At the start of training, if a weight is computed from others, as those of adapters
            are, or shared out along its inputs.

    Example:
        >>> projector = HeadProjector("math.safetensors")
        >>> projector = HeadProjector("math.safetensors", cells=["L15.H8.O", "L3.H0.K"])
        >>> projector = HeadProjector("math.safetensors", cells=8, heatmap="runs/demo", pair="math__code")
    """

    def __init__(
        self,
        protect: str | Path | Iterable[Any],
        rank: int | float = 0.5,
        cells: Literal["all"] | int | Sequence[str] = "all",
        rest: Rest = "leave",
        heatmap: str | Path | None = None,
        pair: str | None = None,
        every_n_epochs: int | None = None,
        projections: Sequence[Projection] | None = None,
        verify: Verify = "first_batch",
    ) -> None:
        check_rank(rank)
        if rest not in {"leave", "tensors"}:
            raise ValueError(f"HeadProjector: rest is {rest!r}, expected 'leave' or 'tensors'.")
        if (isinstance(cells, str) and cells != "all") or (isinstance(cells, int) and cells < 1):
            raise ValueError(
                f"HeadProjector: cells is {cells!r}, expected 'all', a list of names or a number of at least 1."
            )
        if (heatmap is not None) != isinstance(cells, int) or (pair is not None and heatmap is None):
            raise ValueError(
                f"HeadProjector: cells is {cells!r} and heatmap {heatmap!r}, expected a heatmap to choose a number of cells "
                "from, and neither heatmap nor pair otherwise."
            )
        if every_n_epochs is not None and (every_n_epochs < 1 or isinstance(protect, (str, Path))):
            raise ValueError(
                f"HeadProjector: every_n_epochs is {every_n_epochs}, expected at least 1, with batches to measure in `protect`."
            )
        names = [] if isinstance(cells, (str, int)) else list(cells)
        for name in names:
            if not CELL.fullmatch(name):
                raise ValueError(f"HeadProjector: {name!r} is no cell, expected a name such as 'L15.H8.O'.")
        if cells != "all" and rest == "tensors":
            raise ValueError(
                "HeadProjector: rest='tensors' protects the whole model, expected cells='all' with it."
            )
        super().__init__()
        self.protect, self.rank, self.rest, self.projections = protect, rank, rest, projections
        self.verify: Verify = verify
        self.heatmap, self.pair, self.every_n_epochs = heatmap, pair, every_n_epochs
        self.cells = cells if isinstance(cells, (str, int)) else tuple(dict.fromkeys(names))
        self.subspace: ProtectedSubspace | None = None
        """What is protected; None before training."""
        self.taken: Float[Tensor, "layer head block"] | None = None
        """Share of the squared steps of the last epoch that was taken out, NaN where nothing moved."""
        self._projections: list[Projection] = []
        self._names: tuple[str, ...] = ()
        self._weights: dict[str, ProjectedWeight] = {}
        self._cells: dict[str, list[tuple[Projection, list[int]]]] = {}
        self._held: list[FrozenSlice] = []
        self._by_hand = self._has_begun = False
        self._failed_loggers: set[int] = set()

    # When

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the steps of every optimiser."""
        self._has_begun = False
        self._watch_steps(trainer)

    def _begin(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Place the heads, choose the cells, read or measure what is protected, and find the weights."""
        self._has_begun = True
        self._projections = place_heads(trainer, pl_module, batch, self.projections, self.verify)
        self._names = self._chosen()
        if isinstance(self.protect, (str, Path)):
            self.subspace = ProtectedSubspace.load(Path(self.protect).expanduser())
        elif self.subspace is None or trainer.global_step == 0:
            self.subspace = self._measure(pl_module, self.protect)
        self._place(pl_module, self.subspace)

    def _chosen(self) -> tuple[str, ...]:
        """Names of the cells that are protected.

        Raises:
            ValueError: If no cell of the heatmap surely hurts, or the model has no such cell.
        """
        known = tuple(name for projection in self._projections for name in projection.cell_names)
        if isinstance(self.cells, int) and self.heatmap is not None:
            heatmap = InterferenceHeatmap.load(find_latest(Path(self.heatmap).expanduser()))
            names, verdict = worst_cells(heatmap, self._projections, self.pair, top=self.cells)
            if not names:
                raise ValueError(
                    f"HeadProjector: {nothing_sure(verdict, self.heatmap)} Name the cells, or protect all of them."
                )
            return names
        if not isinstance(self.cells, tuple):
            return known
        unknown = [name for name in self.cells if name not in known]
        if unknown:
            raise ValueError(f"HeadProjector: the model has no cell {', '.join(unknown)}.")
        return self.cells

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure again, if it is time."""
        epoch = trainer.current_epoch
        if self.every_n_epochs and epoch and epoch % self.every_n_epochs == 0:
            self.subspace = self._measure(pl_module, self.protect)
            self._place(pl_module, self.subspace)

    def _measure(self, model: nn.Module, probe: Any) -> ProtectedSubspace:
        return measure_subspace(model, probe, rank=self.rank, rest=self.rest, projections=self._projections)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the weights before a batch whose steps the user takes, some of which may have no hooks.

        Raises:
            ValueError: At the first batch, if the heads cannot be placed, no cell surely hurts, or what is
                protected is of another model.
        """
        if not self._has_begun:
            self._begin(trainer, pl_module, batch)
        self._by_hand = not pl_module.automatic_optimization
        if self._by_hand:
            self._note()

    def _before_step(self, *_: Any) -> None:
        self._note()

    def _after_step(self, *_: Any) -> None:
        for weight in self._weights.values():
            weight.project()
        for one in self._held:
            one.put_back()
            one.forget()
        if self._by_hand:
            self._note()

    def _note(self) -> None:
        for weight in self._weights.values():
            weight.remember()
        for one in self._held:
            one.remember()

    # What

    def _place(self, model: nn.Module, subspace: ProtectedSubspace) -> None:
        """Find the weights of the protected cells, and of the rest.

        Raises:
            SubspaceError: If no protected cell trains.
        """
        self._weights, self._cells, self._held = {}, {}, []
        rules: dict[str, tuple[int, list[SubspaceRule]]] = {}
        for projection in self._projections:
            names = projection.cell_names
            heads = [head for head, name in enumerate(names) if name in self._names]
            weight = find_weight(model, projection) if heads else None
            if weight is None or not model.get_parameter(weight.parameter_name).requires_grad:
                continue
            features = projection.head_features[heads]
            basis = self._basis(subspace, projection.module_name)
            output = projection.block == "O"
            rule = (
                SubspaceRule(None, features, basis[heads]) if output else SubspaceRule(features, None, basis)
            )
            input_axis = weight.axis if output else 1 - weight.axis
            rules.setdefault(weight.parameter_name, (input_axis, []))[1].append(rule)
            self._cells.setdefault(weight.parameter_name, []).append((projection, heads))
            bias = self._bias(model, projection, heads, weight.bias_name)
            if bias is not None:
                self._held.append(bias)
        if not rules:
            raise SubspaceError(
                f"HeadProjector: no cell of {', '.join(self._names)} trains, expected one at least."
            )
        num_rest = self._place_rest(model, subspace, rules) if self.rest == "tensors" else 0
        self._weights = {
            name: ProjectedWeight(name, model.get_parameter(name), axis, own)
            for name, (axis, own) in rules.items()
        }
        num_cells = sum(len(heads) for own in self._cells.values() for _, heads in own)
        rank_zero_info(
            f"HeadProjector: {num_cells} cells are protected"
            + (
                f", {num_rest} other weights, and {len(self._held)} are held in part or as a whole"
                if num_rest
                else ""
            )
            + f", by the inputs of {subspace.num_samples} samples ({subspace.num_bytes / 2**20:.3g} MiB)."
        )

    def _basis(self, subspace: ProtectedSubspace, name: str) -> Tensor:
        if name not in subspace.bases:
            raise SubspaceError(
                f"HeadProjector: what is protected has no directions of `{name}`; it has those of "
                f"{', '.join(sorted(subspace.bases)[:8])}, ... Measure it on this model"
                + (", with rest='tensors'." if self.rest == "tensors" else ".")
            )
        return subspace.bases[name]

    def _bias(
        self, model: nn.Module, projection: Projection, heads: list[int], name: str | None
    ) -> FrozenSlice | None:
        """The entries of a bias that protected heads own."""
        if name is not None:
            features = projection.head_features[heads].flatten().tolist()
            return FrozenSlice(model.get_parameter(name), 0, features)
        bias = getattr(model.get_submodule(projection.module_name), "bias", None)
        if projection.block != "O" or not isinstance(bias, nn.Parameter) or len(heads) < projection.num_heads:
            return None
        return FrozenSlice(bias, 0, list(range(len(bias))))

    def _place_rest(
        self, model: nn.Module, subspace: ProtectedSubspace, rules: dict[str, tuple[int, list[SubspaceRule]]]
    ) -> int:
        """Protect what no head owns.

        Raises:
            SubspaceError: If a module or an embedding was not measured.
        """
        known = {id(model.get_parameter(name)) for name in rules} | {id(one.parameter) for one in self._held}
        before = len(rules)
        embedded = set()
        for name, module in model.named_modules():
            prefix = f"{name}." if name else ""
            weight = module._parameters.get("weight")
            if isinstance(module, nn.Embedding) and weight is not None and weight.requires_grad:
                rows = subspace.tokens.get(name)
                if rows is None:
                    raise SubspaceError(
                        f"HeadProjector: what is protected has no rows of `{name}`. Measure it with rest='tensors'."
                    )
                self._held.append(FrozenSlice(weight, 0, rows.tolist()))
                embedded.add(id(weight))
            elif (
                is_linear(module) and weight is not None and weight.requires_grad and id(weight) not in known
            ):
                rule = SubspaceRule(None, None, self._basis(subspace, name))
                rules[f"{prefix}weight"] = (1 if hasattr(module, "in_features") else 0, [rule])
                known.add(id(weight))
        for parameter in model.parameters():
            if parameter.requires_grad and id(parameter) not in known | embedded and parameter.ndim:
                self._held.append(FrozenSlice(parameter, 0, list(range(len(parameter)))))
        return len(rules) - before

    # What is told

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how much of the steps was taken out."""
        shape = (num_layers(self._projections), num_heads(self._projections), len(BLOCKS))
        taken = torch.full(shape, torch.nan)
        for name, cells in self._cells.items():
            for (projection, heads), sums in zip(cells, self._weights[name].taken, strict=False):
                sums = trainer.strategy.reduce(sums.clone(), reduce_op="sum")
                taken[projection.layer, heads, BLOCKS.index(projection.block)] = (sums[0] / sums[1]).cpu()
        for weight in self._weights.values():
            for sums in weight.taken:
                sums.zero_()
        self.taken = taken
        mean = float(taken.nanmean())
        if math.isnan(mean):  # nothing moved
            return
        pl_module.log("projector/taken", mean)
        if trainer.is_global_zero:
            send(trainer.loggers, self._publication(trainer, taken), self._failed_loggers)
        rank_zero_info(
            f"HeadProjector: {mean:.0%} of the squared steps of epoch {trainer.current_epoch} was taken out (mean over cells; "
            f"{float(taken.nan_to_num(1.0).min()):.0%} to {float(taken.nan_to_num(0.0).max()):.0%})."
        )

    def _publication(self, trainer: Trainer, taken: Float[Tensor, "layer head block"]) -> Publication:
        """A heatmap of what was taken out of the steps of the epoch."""
        heads = [
            max((p.num_heads for p in self._projections if p.block == block), default=1) for block in BLOCKS
        ]
        caption = f"epoch {trainer.current_epoch}, step {trainer.global_step}"
        scale = Scale("magma", 0.0, 1.0, "share of the squared steps")
        figure = cells_figure(
            taken.double().numpy(), heads, scale, "Taken out by HeadProjector", f"{scale.meaning} · {caption}"
        )
        return Publication("projector", trainer.global_step, caption, {"taken": render(figure)})

    # What outlives a run

    def state_dict(self) -> dict[str, Any]:
        """What was measured when training started; a file is read again."""
        if self.subspace is None or isinstance(self.protect, (str, Path)):
            return {}
        return {"subspace": self.subspace.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was measured when training started."""
        if "subspace" in state_dict:
            self.subspace = ProtectedSubspace(**state_dict["subspace"])

    def _let_go(self) -> None:
        self._weights, self._held = {}, []
