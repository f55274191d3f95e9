"""Other ways to per-sample gradients of the attention projections, each inside an ordinary training step."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from opacus import GradSampleModule
from shapes import LanguageModel, loss_of
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from qkov_lightning import GradientCapture, find_projections
from qkov_lightning.capture.samples import read_labels


class CaptureAlone(Callback):
    """What the monitor does in every step, without the writing."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.capture = GradientCapture(pl_module, find_projections(pl_module))

    def on_train_batch_start(self, *_: Any) -> None:
        self.capture.start()

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: dict, index: int
    ) -> None:
        steps = self.capture.finish(lambda: read_labels(batch, "task", "sample_id", "num_target_tokens"))
        assert all(step.is_finite for step in steps)


class BackwardHooks(Callback):
    """Full backward hooks that form the gradient of each sample on the spot."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.gradients: dict[nn.Module, Tensor] = {}
        self._inputs: dict[nn.Module, Tensor] = {}
        for name in {projection.module_name for projection in find_projections(pl_module)}:
            module = pl_module.get_submodule(name)
            module.register_forward_hook(self._keep_input)
            module.register_full_backward_hook(self._form)

    def _keep_input(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._inputs[module] = args[0].detach()

    def _form(self, module: nn.Module, grad_input: Any, grad_output: tuple[Tensor, ...]) -> None:
        self.gradients[module] = grad_output[0].transpose(1, 2) @ self._inputs.pop(module)

    def on_train_batch_end(self, *_: Any) -> None:
        self.gradients.clear()


class Opacus(Callback):
    """``GradSampleModule`` around each projection, and nothing else: opacus would do so for every layer."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.weights = []
        for name in {projection.module_name for projection in find_projections(pl_module)}:
            parent, _, child = name.rpartition(".")
            wrapped = GradSampleModule(pl_module.get_submodule(name), loss_reduction="mean")
            setattr(pl_module.get_submodule(parent), child, wrapped)
            self.weights += list(wrapped.parameters())

    def on_train_batch_end(self, *_: Any) -> None:
        for weight in self.weights:
            assert weight.grad_sample is not None
            weight.grad_sample = None


class Functional(LanguageModel):
    """``vmap(grad)`` over the samples; the gradient to train with is their mean."""

    automatic_optimization = False

    def training_step(self, batch: dict, batch_idx: int) -> None:
        weights = dict(self.model.named_parameters())

        def loss(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
            def model(**inputs: Any) -> Any:
                return functional_call(self.model, weights, kwargs=inputs)

            return loss_of(model, sample[None])

        gradients = vmap(grad(loss), in_dims=(None, 0))(weights, batch["tokens"])
        for name, weight in weights.items():
            weight.grad = gradients[name].mean(dim=0)
        self.optimizers().step()
