"""How often the gate raises a false alarm, and how often it finds a planted drift.

Trains a small decoder on prose, code and arithmetic. Null pairs: two probes of disjoint samples of this one
checkpoint. Planted drifts: one known head, and nothing else, is trained until one task is more sensitive
there to what another pushes, and its weights are mixed with the old ones so that the score rises by about a
given share of its value. The gradients of a pool of samples are computed once; each probe draws its samples
from the pool. The scores and their leave-out values are computed here from sums over groups of samples, and
checked against ``probe_interference`` first.

    python tests/benchmarks/gate_calibration.py
"""

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from qkov_lightning import (
    HeadInterference,
    InterferenceHeatmap,
    ScoreSettings,
    check_drift,
    find_projections,
    probe_interference,
)
from qkov_lightning.drift.drift import DEFAULT_SCORES
from qkov_lightning.measure.cells import BlockInfo, Layer
from qkov_lightning.measure.certainty import jackknife_error
from qkov_lightning.measure.jackknife import MAX_GROUPS
from qkov_lightning.measure.probe import FISHER
from qkov_lightning.scores.scores import HARM

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
import byte_model  # noqa: E402

LAYERS, HEADS, WIDTH, CONTEXT = 2, 4, 32, 128
TASKS = ("prose", "code", "math")
LAYER, HEAD, BLOCK, SCORE = 1, 2, "O", "relative"
OWN = slice(HEAD * WIDTH // HEADS, (HEAD + 1) * WIDTH // HEADS)
PLANTED = (("math", "prose"), ("prose", "code"))
"""Whose sensitivity rises, and who pushes: a sure cell (arithmetic is all alike) and an unsure one."""
SCORES = ("relative", "cosine")
"""Scores that are computed here in closed form."""

DAMPING = 1e-3
EFFECTS = (0.25, 0.5, 1.0)
SAMPLES = (32, 64, 128)
STARTED = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:4.0f} s] {text}", file=sys.stderr, flush=True)


class Texts:
    def __init__(self) -> None:
        sources = {"prose": byte_model.prose(), "code": byte_model.code(), "math": byte_model.math()}
        self.bytes = {task: torch.tensor(list("\n".join(t.values()).encode())) for task, t in sources.items()}

    def draw(self, task: str, count: int, generator: torch.Generator) -> Tensor:
        text = self.bytes[task]
        starts = torch.randint(len(text) - CONTEXT - 1, (count, 1), generator=generator)
        return text[starts + torch.arange(CONTEXT + 1)]


def loss_of(model: nn.Module, samples: Tensor) -> Tensor:
    return functional.cross_entropy(model(samples[:, :-1]).flatten(0, 1), samples[:, 1:].flatten())


def train(texts: Texts, steps: int = 400) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    model = byte_model.ByteDecoder(WIDTH, HEADS, LAYERS, CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = loss_of(model, torch.cat([texts.draw(task, 8, generator) for task in TASKS]))
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            say(f"training, step {step}: loss {loss.item():.2f}")
    return model.eval()


def gradients_of(model: nn.Module, samples: Sequence[Tensor]) -> Tensor:
    """Gradients of each sample's own loss: [task, sample, layer, block, head, weight]."""
    every = {name: weight.detach() for name, weight in model.named_parameters()}
    names = [f"layers.{layer}.self_attn.{block}_proj.weight" for layer in range(LAYERS) for block in "qkvo"]

    def sample_loss(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
        return loss_of(lambda x: functional_call(model, {**every, **weights}, (x,)), sample[None])

    tasks = []
    with sdpa_kernel(SDPBackend.MATH):
        for task in samples:
            parts = []
            for chunk in task.split(128):
                found = vmap(grad(sample_loss), (None, 0))({name: every[name] for name in names}, chunk)
                rows = [found[n].transpose(1, 2) if "o_proj" in n else found[n] for n in names]
                parts.append(torch.stack([one.reshape(len(chunk), HEADS, -1) for one in rows], dim=1))
            tasks.append(torch.cat(parts).unflatten(1, (LAYERS, 4)))
    return torch.stack(tasks)


def scores_of(square: Tensor, absolute: Tensor, mean: Tensor) -> dict[str, Tensor]:
    """Scores [task, task, ..., layer, head, block] from means [task, ..., layer, block, head, weight]."""
    fisher = square.mean(dim=0)
    inverse = 1 / (fisher + DAMPING * fisher.mean(dim=-1, keepdim=True))
    relative = torch.einsum("a...k,...k,b...k->ab...", square, inverse, absolute) / absolute.sum(dim=-1)
    norm = mean.norm(dim=-1)
    cosine = torch.einsum("a...k,b...k->ab...", mean, mean) / (norm[:, None] * norm)
    return {"relative": relative.transpose(-1, -2), "cosine": cosine.transpose(-1, -2)}


def measure(gradients: Tensor, samples: str) -> InterferenceHeatmap:
    """What a probe of these samples finds, between different tasks."""
    count = gradients.shape[1]
    group = torch.arange(count) % MAX_GROUPS
    member = functional.one_hot(group, MAX_GROUPS).T.to(gradients)
    kept = (count - member.sum(dim=1)).view(1, -1, 1, 1, 1, 1)
    means, left_out = [], []
    for values in (gradients.square(), gradients.abs(), gradients):
        sums = torch.einsum("gs,tslbhk->tglbhk", member, values)
        total = sums.sum(dim=1)
        means.append(total / count)
        left_out.append((total[:, None] - sums) / kept)
    replicates = {name: values.movedim(2, 0).double() for name, values in scores_of(*left_out).items()}
    info = {block: BlockInfo(f"{block}_proj", HEADS, 1, "measured") for block in "QKVO"}
    return InterferenceHeatmap(
        TASKS,
        tuple(Layer(f"layers.{layer}", info) for layer in range(LAYERS)),
        {name: values.double() for name, values in scores_of(*means).items()},
        {name: jackknife_error(values) for name, values in replicates.items()},
        torch.full((len(TASKS), LAYERS, HEADS, 4), float(count), dtype=torch.float64),
        notes={
            "fisher": FISHER,
            "damping": DAMPING,
            "degrees_of_freedom": MAX_GROUPS - 1,
            "samples": samples,
        },
        replicates=replicates,
    )


def check_against_the_package(model: nn.Module, samples: Sequence[Tensor], gradients: Tensor) -> None:
    batches = [{"x": x[:64], "task": task} for x, task in zip(samples, TASKS, strict=True)]
    found = probe_interference(
        model,
        batches,
        loss=lambda module, batch: loss_of(module, batch["x"]),
        settings=ScoreSettings(num_hot_cells=0),
        projections=find_projections(model),
    )
    expected = measure(gradients[:, :64], "own")
    order = [found.tasks.index(task) for task in TASKS]
    different = ~torch.eye(len(TASKS), dtype=torch.bool)
    for name, values in expected.scores.items():
        for ours, theirs in (
            (values, found.scores[name]),
            (expected.standard_errors[name], found.standard_errors[name]),
        ):
            theirs = theirs[order][:, order][different]
            torch.testing.assert_close(ours[different], theirs, rtol=5e-3, atol=1e-4)
    say("scores and standard errors agree with those of probe_interference")


def draw(count: int, pool: int, generator: torch.Generator) -> Tensor:
    """Indices of two disjoint sets of samples: [set, task, sample]."""
    chosen = [torch.randperm(pool, generator=generator)[: 2 * count].view(2, count) for _ in TASKS]
    return torch.stack(chosen, dim=1)


def pick(pool: Tensor, indices: Tensor) -> Tensor:
    return torch.stack([task[own] for task, own in zip(pool, indices, strict=True)])


def plant(model: nn.Module, texts: Texts, pair: tuple[str, str], goal: float, steps: int = 300) -> nn.Module:
    """Train the head until task a is so much more sensitive to what task b pushes there.

    Raises:
        RuntimeError: If it does not become so.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(2)
    prefix = f"layers.{LAYER}.self_attn."
    weights = dict(model.named_parameters())
    trained = {prefix + f"{name}_proj.weight": weights[prefix + f"{name}_proj.weight"] for name in "qkvo"}
    output = prefix + "o_proj.weight"
    optimizer = torch.optim.Adam(trained.values(), 1e-2)
    masks = {name: torch.zeros_like(weight) for name, weight in trained.items()}
    for name, mask in masks.items():
        mask[(slice(None), OWN) if name == output else OWN] = 1

    def sample_loss(weight: Tensor, sample: Tensor) -> Tensor:
        return loss_of(lambda x: functional_call(model, {**weights, output: weight}, (x,)), sample[None])

    a, b = (TASKS.index(task) for task in pair)
    with sdpa_kernel(SDPBackend.MATH):
        for step in range(steps):
            squares, absolutes = [], []
            for task in TASKS:
                own = vmap(grad(sample_loss), (None, 0))(weights[output], texts.draw(task, 24, generator))
                squares.append(own[:, :, OWN].square().mean(dim=0))
                absolutes.append(own[:, :, OWN].abs().mean(dim=0))
            fisher = torch.stack(squares).mean(dim=0)
            score = (squares[a] / (fisher + DAMPING * fisher.mean()) * absolutes[b]).sum() / absolutes[
                b
            ].sum()
            if score > goal:
                say(f"planted after {step} steps: {SCORE} {score.item():.2f}")
                return model
            optimizer.zero_grad()
            (-score).backward()
            for name, weight in trained.items():
                weight.grad *= masks[name]
            optimizer.step()
    raise RuntimeError(f"{steps} steps raised {SCORE} to {score.item():.2f} only, expected {goal:.2f}.")


def mixed(old: nn.Module, new: nn.Module, share: float) -> nn.Module:
    """The old model with a share of the planted head's new weights; the two differ nowhere else."""
    model = copy.deepcopy(old)
    ends = zip(model.parameters(), old.parameters(), new.parameters(), strict=True)
    for weight, before, after in ends:
        weight.data.copy_(torch.lerp(before.data, after.data, share))
    return model


def planted_value(heatmap: InterferenceHeatmap, pair: tuple[str, str]) -> float:
    return float(heatmap.values(*pair, SCORE)[LAYER, HEAD, "QKVO".index(BLOCK)])


def interval(count: int, total: int) -> str:
    low, high = stats.binomtest(count, total).proportion_ci(0.95, "exact")
    return f"{count / total:.1%} | {low:.1%} to {high:.1%}"


def false_alarms(
    pool: Tensor, pairs: int, measured: Callable[[Tensor, str], InterferenceHeatmap], scores: Sequence[str]
) -> dict[float, int]:
    generator = torch.Generator().manual_seed(4)
    alarms = {0.05: 0, 0.0: 0}
    for number in range(1, pairs + 1):
        sets = draw(64, pool.shape[1], generator)
        first, second = (measured(pick(pool, own), str(i)) for i, own in enumerate(sets))
        for tolerance in alarms:
            alarms[tolerance] += check_drift(first, second, scores=scores, tolerance=tolerance).drifted
        if number % 50 == 0:
            say(f"null pairs: {number} of {pairs}, alarms {alarms}, by {', '.join(scores)}")
    return alarms


def measure_rises(gradients: Tensor, samples: str) -> InterferenceHeatmap:
    """What a probe of these samples finds, by all scores that the gate judges."""
    heatmap = measure(gradients, samples)
    group = torch.arange(gradients.shape[1]) % MAX_GROUPS

    def compute(kept: Tensor) -> Tensor:
        metric = HeadInterference(TASKS, LAYERS, HEADS, ScoreSettings(damping=DAMPING))
        tasks = torch.arange(len(TASKS)).repeat_interleave(int(kept.sum()))
        for layer in range(LAYERS):
            for index, block in enumerate("QKVO"):
                own = gradients[:, kept, layer, index]
                metric.update(
                    own.flatten(0, 1), tasks, own.square().mean(dim=(0, 1)), layer=layer, block=block,
                    num_terms=torch.full((len(tasks),), float(CONTEXT)),
                )  # fmt: skip
        return metric.compute()[HARM].double()

    replicates = torch.stack([compute(group != one) for one in range(MAX_GROUPS)])
    return replace(
        heatmap,
        scores={**heatmap.scores, HARM: compute(group >= 0)},
        standard_errors={**heatmap.standard_errors, HARM: jackknife_error(replicates)},
        replicates={**heatmap.replicates, HARM: replicates},
    )


def power(old: Tensor, new: Tensor, count: int, runs: int, same: bool) -> tuple[int, int]:
    """Runs of the gate that found drift, and runs that named the planted head first."""
    generator = torch.Generator().manual_seed(5)
    found = named = 0
    for _ in range(runs):
        before, after = draw(count, old.shape[1], generator)
        first = measure(pick(old, before), "a")
        second = measure(pick(new, before if same else after), "a" if same else "b")
        report = check_drift(first, second, scores=SCORES)
        found += report.drifted
        named += report.drifted and (report.findings[0].layer, report.findings[0].head) == (LAYER, HEAD)
    return found, named


def draw_figure(results: dict, runs: int, path: Path) -> None:
    """Power over effect size, a panel for each planted pair and kind of samples."""
    colours = dict(zip(SAMPLES, ("#E69F00", "#0072B2", "#009E73"), strict=True))  # Okabe & Ito
    markers = dict(zip(SAMPLES, "os^", strict=True))
    figure = Figure(figsize=(9.5, 5.6), layout="constrained")
    axes = figure.subplots(2, len(PLANTED), sharex=True, sharey=True)
    for row, same in enumerate((True, False)):
        for column, pair in enumerate(PLANTED):
            axis = axes[row][column]
            for number, count in enumerate(SAMPLES):
                points = [results[pair, same, count, effect] for effect in EFFECTS]
                shares = [found / runs for _, found, _ in points]
                bounds = [stats.binomtest(found, runs).proportion_ci(0.95, "exact") for _, found, _ in points]
                lengths = [
                    [max(0.0, share - bound.low) for share, bound in zip(shares, bounds, strict=True)],
                    [max(0.0, bound.high - share) for share, bound in zip(shares, bounds, strict=True)],
                ]
                axis.errorbar(
                    [rise + 0.012 * (number - 1) for rise, _, _ in points], shares, lengths, color=colours[count],
                    marker=markers[count], capsize=3, label=f"{count} samples a task",
                )  # fmt: skip
            axis.axhline(0.9, color="0.5", linestyle=":", linewidth=1)
            axis.set_ylim(-0.03, 1.03)
            axis.grid(alpha=0.2)
            samples = "the same samples" if same else "other samples"
            axis.set_title(f"{pair[1]} pushes on {pair[0]}, {samples}", fontsize=10)
            if row == 1:
                axis.set_xlabel("true rise, as a share of the baseline's value")
            if column == 0:
                axis.set_ylabel("share of runs that fail")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(SAMPLES), frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=400, help="null pairs")
    parser.add_argument(
        "--rises", type=int, default=100, help="null pairs that are judged by the rise of the loss, too"
    )
    parser.add_argument("--runs", type=int, default=40, help="runs of the gate for each planted drift")
    parser.add_argument("--pool", type=int, default=1024, help="samples of each task to draw from")
    parser.add_argument("--figure", type=Path, default=EXAMPLES / "gate_calibration.png")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*requires_grad=True to a scalar.*")
    torch.manual_seed(0)
    texts = Texts()
    model = train(texts)
    generator = torch.Generator().manual_seed(3)
    samples = [texts.draw(task, arguments.pool, generator) for task in TASKS]
    pool = gradients_of(model, samples)
    check_against_the_package(model, samples, pool)

    print("| tolerance | null pairs | false alarms | 95% interval |\n| --- | --- | --- | --- |")
    for tolerance, count in false_alarms(pool, arguments.pairs, measure, SCORES).items():
        print(f"| {tolerance:g} | {arguments.pairs} | {interval(count, arguments.pairs)} |", flush=True)

    for tolerance, count in false_alarms(pool, arguments.rises, measure_rises, DEFAULT_SCORES).items():
        print(
            f"| {tolerance:g}, with {HARM} | {arguments.rises} | {interval(count, arguments.rises)} |",
            flush=True,
        )

    results = {}
    half = pool[:, : arguments.pool // 2]
    true_old = measure(half, "pool")
    print("\n| planted | rise | samples of both | 32 samples a task | 64 | 128 |")
    print("| --- | --- | --- | --- | --- | --- |")
    for pair in PLANTED:
        value = planted_value(true_old, pair)
        goal = min(2.3 * value, 0.95 * len(TASKS))
        say(
            f"planting in L{LAYER}.H{HEAD}.{BLOCK}: {pair[1]} pushes on {pair[0]}, {value:.2f}, to {goal:.2f}"
        )
        planted = plant(model, texts, pair, goal)
        few = [own[:128] for own in samples]
        shares = torch.linspace(0, 1, 9)
        rises = [
            planted_value(measure(gradients_of(mixed(model, planted, float(s)), few), ""), pair)
            for s in shares
        ]
        rises = torch.tensor(rises) / rises[0] - 1
        for effect in EFFECTS:
            after = int((rises >= effect).nonzero()[0]) if bool((rises >= effect).any()) else len(rises) - 1
            part = (effect - rises[after - 1]) / (rises[after] - rises[after - 1])
            share = float(torch.lerp(shares[after - 1], shares[after], part.clamp(0, 1)))
            changed = gradients_of(mixed(model, planted, share), [own[: half.shape[1]] for own in samples])
            rise = planted_value(measure(changed, "pool"), pair) / value - 1
            for same in (True, False):
                cells = []
                for count in SAMPLES:
                    found, named = power(half, changed, count, arguments.runs, same)
                    results[pair, same, count, effect] = (rise, found, named)
                    cells.append(f"{found / arguments.runs:.0%} ({named / max(1, found):.0%})")
                print(
                    f"| {pair[1]} on {pair[0]} | {rise:.0%} | {'same' if same else 'other'} | {' | '.join(cells)} |",
                    flush=True,
                )
            say(f"effect {effect:g} done")
    print(
        f"\nShare of {arguments.runs} runs that fail (of these, the share that names the planted head first)."
    )
    draw_figure(results, arguments.runs, arguments.figure)


if __name__ == "__main__":
    main()
