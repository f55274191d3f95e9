"""The ``qkov`` command."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from jsonargparse import auto_cli
from lightning.pytorch import LightningDataModule, LightningModule
from rich.console import Console

from qkov_lightning import __version__
from qkov_lightning.capture.capture_check import verify_capture
from qkov_lightning.capture.reductions import ReductionChoice
from qkov_lightning.drift.gate import NOT_COMPARABLE, WRONG_USAGE, Format, judge, load_baseline
from qkov_lightning.heads.inspection import describe, load_model, random_batch
from qkov_lightning.heads.projections import Block
from qkov_lightning.heads.verification import verify_projections
from qkov_lightning.measure.cells import printable
from qkov_lightning.measure.encoding import HeatmapError
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.measure.probe import Probe, find_probe, load_weights, probe_interference
from qkov_lightning.measure.subspace import Rest, measure_subspace
from qkov_lightning.views.report import find_latest, find_step, load_history, write_report
from qkov_lightning.views.tables import COLUMNS, select, selected_rows, to_csv, to_json
from qkov_lightning.views.terminal import epoch_table, markdown_table, overview

BASELINE = Path("interference-baseline.json")


def show(
    run: Path,
    pair: str | None = None,
    block: Block | None = None,
    score: str = "interference",
    top: int | None = None,
    step: int | None = None,
    format: Literal["table", "json", "csv", "markdown"] = "table",
) -> None:
    """Show a heatmap in the terminal, or print it for another program.

    Args:
        run: A heatmap file, or a folder that holds one somewhere below (the newest is shown).
        pair: One task pair, as in the names of scalars and figures: ``<task_a>__<task_b>``.
        block: One block.
        score: Score to draw and to sort by.
        top: Most cells per task pair; 10 in a table, all of them in json and csv.
        step: A snapshot instead of the newest heatmap.
        format: "table" for people, "json", "csv" or "markdown" for everything else.
    """
    heatmap = InterferenceHeatmap.load(find_latest(run) if step is None else find_step(run, step))
    if top is None and format in {"table", "markdown"}:
        top = 10
    selection = select(heatmap, pair, score, block, top)
    if format == "table":
        Console().print(overview(heatmap, selection))
    elif format == "markdown":
        for a, b in selection.pairs:
            title = f"{printable(b)} pushes on {printable(a)}: {selection.score}"
            sys.stdout.write(f"**{title}**\n\n{markdown_table(heatmap, a, b, selection)}\n\n")
    elif format == "csv":
        sys.stdout.write(to_csv(COLUMNS, selected_rows(heatmap, selection)))
    else:
        sys.stdout.write(to_json(COLUMNS, selected_rows(heatmap, selection)) + "\n")


def report(runs: list[Path], output: Path = Path("report.html")) -> None:
    """Write one self-contained HTML page that opens without a network.

    Args:
        runs: Heatmap files, or folders that hold one somewhere below with its snapshots.
        output: The page.
    """
    write_report([load_history(run) for run in runs], output)
    Console().print(f"Wrote {output}", soft_wrap=True, highlight=False)


def probe(
    checkpoint: Path,
    model: LightningModule | None = None,
    data: LightningDataModule | None = None,
    hook: str = "probe_dataloader",
    loss: Callable[..., Any] | None = None,
    loss_reduction: ReductionChoice = "auto",
    task_of: str = "task",
    output: Path = Path("interference-probe.json"),
) -> None:
    """Measure the interference of fixed samples at the weights of a checkpoint.

    Args:
        checkpoint: Checkpoint that Lightning wrote.
        model: LightningModule with the arguments it was trained with (`--model my_module.MyModel
            --model.width 64`).
        data: LightningDataModule that has the samples.
        hook: Method of the data module (or the model) that returns their DataLoader.
        loss: Function of the model and a batch, as an import path; the model's `training_step` without it.
        loss_reduction: How the loss joins the samples of a batch: mean, token_mean or sum; auto reads it from
            the loss.
        task_of: Batch key that gives the task of each sample.
        output: File to write.
    """
    loaded, batches, (step, epoch) = _load(model, data, checkpoint, hook)
    heatmap = probe_interference(
        loaded,
        batches,
        loss=loss,
        loss_reduction=loss_reduction,
        task_of=task_of,
    )
    heatmap = replace(heatmap, step=step, epoch=epoch)
    heatmap.save(output)
    Console().print(epoch_table(heatmap))
    sys.stdout.write(f"{output}\n")


def protect(
    checkpoint: Path,
    model: LightningModule | None = None,
    data: LightningDataModule | None = None,
    hook: str = "probe_dataloader",
    rank: int | float = 0.5,
    rest: Rest = "leave",
    output: Path = Path("protected.safetensors"),
) -> None:
    """Measure which directions of its weights the samples use, for HeadProjector to keep them.

    Args:
        checkpoint: Checkpoint that Lightning wrote.
        model: LightningModule with the arguments it was trained with (`--model my_module.MyModel
            --model.width 64`).
        data: LightningDataModule that has the samples of the tasks to protect.
        hook: Method of the data module (or the model) that returns their DataLoader.
        rank: Directions of each module's inputs: a number of them, or their share of the inputs.
        rest: "tensors" also measures the weights outside of the heads, for full fine-tuning.
        output: File to write.
    """
    loaded, batches, _ = _load(model, data, checkpoint, hook)
    subspace = measure_subspace(loaded, batches, rank=rank, rest=rest)
    subspace.save(output)
    size = f"{subspace.num_bytes / 2**20:.3g} MiB"
    sys.stdout.write(f"{output}: {len(subspace.bases)} modules, {subspace.num_samples} samples, {size}\n")


def verify(
    model: LightningModule | None = None,
    data: LightningDataModule | None = None,
    checkpoint: Path | None = None,
    hook: str = "train_dataloader",
    loss: Callable[..., Any] | None = None,
    loss_reduction: ReductionChoice = "auto",
) -> None:
    """Compare the captured gradients of a batch with those of each of its samples alone.

    Args:
        model: LightningModule with the arguments it is trained with (`--model my_module.MyModel --model.width
            64`).
        data: LightningDataModule whose first batch is taken; a few samples are enough.
        checkpoint: Checkpoint that Lightning wrote; the weights that the model starts with without it.
        hook: Method of the data module (or the model) that returns the DataLoader.
        loss: Function of the model and a batch, as an import path; the model's `training_step` without it.
        loss_reduction: How the loss joins the samples of a batch: mean, token_mean or sum; auto reads it from
            the loss.

    Raises:
        ValueError: If a gradient is not the one of the sample alone.
    """
    loaded, batches, _ = _load(model, data, checkpoint, hook)
    verification = verify_capture(loaded, next(iter(batches)), loss=loss, loss_reduction=loss_reduction)
    Console().print(verification)
    if not verification.passed:
        raise ValueError(verification.summary)


def _load(
    model: LightningModule | None, data: LightningDataModule | None, checkpoint: Path | None, hook: str
) -> tuple[LightningModule, Probe, tuple[int, int]]:
    """A model with the weights of a checkpoint, the batches to run it on, and its steps and epochs so far.

    Raises:
        ValueError: If the model or the data is missing.
    """
    if model is None or data is None:
        raise ValueError("Say what to load: `--model <class path>` and `--data <class path>`.")
    done = (0, 0) if checkpoint is None else load_weights(model, checkpoint)
    data.prepare_data()
    data.setup("fit")
    return model, find_probe(hook, data, model), done


def gate(
    run: Path,
    baseline: Path = BASELINE,
    tolerance: float = 0.05,
    alpha: float = 0.05,
    scores: tuple[str, ...] = ("relative", "cosine"),
    min_samples: int = 16,
    format: Format = "text",
    junitxml: Path | None = None,
) -> int:
    """Fail if interference rose beyond noise.

    Exit status: 0 no drift, 1 drift, 2 wrong usage, 3 not comparable.

    Never writes the baseline: `qkov baseline update` does. Where the environment has GITHUB_STEP_SUMMARY, the
    report is added to that file in Markdown.

    Args:
        run: A heatmap file, or a folder that holds one somewhere below (the newest is judged).
        baseline: File of the heatmap that is accepted.
        tolerance: Rise that is allowed, in units of the score.
        alpha: Chance of a false alarm that is allowed.
        scores: Scores to judge by.
        min_samples: Samples that every task needs.
        format: text, markdown, json or github (annotations).
        junitxml: File for a report as JUnit XML.
    """
    command = _update_command(run, baseline)
    verdict = judge(
        lambda: load_baseline(baseline, command),
        lambda: _load_run(run),
        update_command=command,
        format=format,
        scores=scores,
        tolerance=tolerance,
        alpha=alpha,
        min_samples=min_samples,
    )
    if junitxml is not None:
        junitxml.parent.mkdir(parents=True, exist_ok=True)
        junitxml.write_text(verdict.junit, encoding="utf-8")
    if os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(os.environ["GITHUB_STEP_SUMMARY"]).open("a", encoding="utf-8") as summary:
            summary.write(verdict.summary + "\n")
    sys.stdout.write(verdict.output)
    return verdict.status


def diff(a: Path, b: Path, tolerance: float = 0.0, format: Format = "text") -> None:
    """Show what rose from one heatmap to another. Exit status 0, whatever it finds.

    Args:
        a: A heatmap file, or a folder that holds one somewhere below (the newest is taken).
        b: The same, for the later heatmap.
        tolerance: Rise that is not worth a word, in units of the score.
        format: text, markdown, json or github (annotations).
    """
    verdict = judge(
        lambda: _load_run(a), lambda: _load_run(b), format=format, tolerance=tolerance, min_samples=2
    )
    sys.stdout.write(verdict.output)


def update_baseline(run: Path, baseline: Path = BASELINE) -> None:
    """Accept a heatmap as the baseline of `qkov gate`.

    Args:
        run: A heatmap file, or a folder that holds one somewhere below (the newest is taken).
        baseline: File to write.
    """
    heatmap = _load_run(run)
    heatmap.save(baseline)
    counts = ", ".join(f"{task} {count}" for task, count in heatmap.samples_per_task.items())
    sys.stdout.write(f"{baseline}: step {heatmap.step}, samples: {printable(counts)}\n")


def _load_run(run: Path) -> InterferenceHeatmap:
    return InterferenceHeatmap.load(find_latest(run))


def _update_command(run: Path, baseline: Path) -> str:
    return shlex.join(["qkov", "baseline", "update", str(run), "--baseline", str(baseline)])


def inspect(model: str, verify: bool = False, num_tokens: int = 512) -> None:
    """Show which features of which module belong to each head of a model.

    Args:
        model: Import path ``package.module:function`` to a function that returns the model, or a local
            ``from_pretrained`` folder.
        verify: Also prove on random tokens or images that each slice is the head that the model computes.
        num_tokens: Tokens of a sample, for the estimate of its size in the cache.

    Raises:
        ValueError: If a slice is not the head that it is said to be.
    """
    loaded = load_model(model)
    Console().print(describe(loaded, num_tokens))
    if verify:
        verification = verify_projections(loaded, random_batch(loaded))
        if not verification.passed:
            raise ValueError(str(verification))
        Console().print(str(verification))


def main() -> None:
    """Entry point of the ``qkov`` command."""
    commands: dict[str, Any] = {
        "inspect": inspect,
        "show": show,
        "report": report,
        "probe": probe,
        "protect": protect,
        "verify": verify,
        "gate": gate,
        "diff": diff,
        "baseline": {"_help": "The accepted heatmap of `qkov gate`.", "update": update_baseline},
    }
    # Classes in the current folder can be named, as with `python -m`.
    sys.path.insert(0, str(Path.cwd()))
    try:
        status = auto_cli(
            commands,
            args=_arguments(sys.argv[1:]),
            description="See where in a transformer several tasks interfere.",
            prog="qkov",
            version=__version__,
        )
    except HeatmapError as error:
        _stop(error, NOT_COMPARABLE)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        _stop(error, WRONG_USAGE)
    if status:
        sys.exit(status)


def _stop(error: Exception, status: int) -> NoReturn:
    """Never status 1, which `qkov gate` keeps for drift."""
    sys.stderr.write(f"qkov: {error}\n")
    sys.exit(status)


def _arguments(given: list[str]) -> list[str]:
    """``report RUN... -o FILE`` in the form of the parser, which takes a list as one argument in JSON."""
    if given[:1] != ["report"]:
        return given
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("-o", "--output")
    known, rest = parser.parse_known_args(given[1:])
    runs = [json.dumps(known.runs)] if known.runs else []
    return ["report", *runs, *(["--output", known.output] if known.output else []), *rest]
