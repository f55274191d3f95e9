"""Capture and metric in a PyTorch loop of one's own, without a Trainer: python examples/plain_loop.py."""

from collections.abc import Iterable

import torch
from byte_model import ByteDecoder, TextTasks
from torch import Tensor
from torch.nn import functional

from qkov_lightning import EmpiricalFisher, GradientCapture, HeadInterference, find_projections, task
from qkov_lightning.capture.gradients import head_gradients

TASKS = ["prose", "code", "math"]


def train(model: ByteDecoder, batches: Iterable[dict]) -> dict[str, Tensor]:
    """Train on the batches and score all of their samples."""
    projections = find_projections(model)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    gradients: dict[str, list[Tensor]] = {p.module_name: [] for p in projections}
    tasks: list[str] = []
    fishers = {p.module_name: EmpiricalFisher() for p in projections}
    with GradientCapture(model, projections) as capture:
        for batch in batches:
            text = batch["bytes"]
            capture.start()
            with task(batch["task"]):
                logits = model(text[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            # Every sample's gradient stays in memory here; the Lightning callback keeps them on disk.
            for step in capture.finish():
                tasks += step.samples.tasks
                for projection in projections:
                    name = projection.module_name
                    new = head_gradients(step.factors[name], projection, step.scales)
                    fishers[name].update(new, step.samples.tasks)
                    gradients[name].append(new)
    metric = HeadInterference(TASKS, num_layers=len(model.layers), num_heads=projections[0].num_heads)
    for projection in projections:
        name = projection.module_name
        metric.update(
            torch.cat(gradients[name]),
            tasks,
            fishers[name].pooled(),
            layer=projection.layer,
            block=projection.block,
        )
    return metric.compute()


def main() -> None:
    torch.manual_seed(0)
    scores = train(ByteDecoder(width=64, num_layers=2), TextTasks(num_train=120).train_dataloader())
    for a, first in enumerate(TASKS):
        for b, second in enumerate(TASKS):
            if a != b:
                print(
                    f"{second} pushes on {first}: relative up to {float(scores['relative'][a, b].max()):.2f}"
                )


if __name__ == "__main__":
    main()
