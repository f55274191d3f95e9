"""The terminal shows the heatmap at 80 columns and without colour, and prints it for other programs."""

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from rich.console import Console, RenderableType
from rich.progress import Progress, TaskID
from synthetic import make_heatmap, train

from qkov_lightning import InterferenceHeatmap, InterferenceMonitor, cli
from qkov_lightning.measure.cells import SamplePair
from qkov_lightning.scores.scores import SCORES
from qkov_lightning.views.screen import epoch_lines, screen
from qkov_lightning.views.tables import COLUMNS, cell_rows, metrics, select, write_tables
from qkov_lightning.views.terminal import SHADES, Steps, cells_table, details, heatmap_panel, markdown_table


def plain(renderable: RenderableType, width: int = 80) -> list[str]:
    console = Console(width=width, color_system=None, file=io.StringIO(), legacy_windows=False)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get().splitlines()


def qkov(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    monkeypatch.setattr("sys.argv", ["qkov", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "80")
    cli.main()
    return capsys.readouterr().out


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (120, 240):
        heatmap = make_heatmap(step=step, epoch=step // 120 - 1, seed=step)
        heatmap.save(tmp_path / "snapshots" / f"step_{step:08d}.json")
        heatmap.save(tmp_path / "latest.json")
    return tmp_path


def shades_of(values: list[float]) -> list[str]:
    """By hand: which quarter of the interfering cells a value is in."""
    known = sorted(value for value in values if value == value)
    bounds = [np.quantile(known, share) for share in (0, 0.25, 0.5, 0.75)]
    return ["/" if v != v else SHADES[sum(v >= bound for bound in bounds) - 1] for v in values]


def test_without_colour_every_cell_is_told_by_its_quarter() -> None:
    heatmap = make_heatmap()
    lines = plain(heatmap_panel(heatmap, "math", "code", "relative", "O"))
    rows = [line.strip("│ ").split() for line in lines[2:5]]
    every = heatmap.values("math", "code", "relative").flatten().tolist()
    shades = dict(zip(every, shades_of(every), strict=True))
    for layer, (label, cells) in enumerate(rows):
        assert label == str(layer)
        if layer == 1:
            assert cells == "xx" * 4
            continue
        values = heatmap.values("math", "code", "relative")[layer, :, 3].tolist()
        assert cells[::2] == "".join(shades[value] for value in values)


@pytest.mark.parametrize(("score", "worst"), [("cosine", min), ("loss_rise", max)])
def test_the_darkest_cells_of_a_score_with_a_sign_are_those_that_interfere_most(
    score: str, worst: Callable[[list[float]], float]
) -> None:
    values = make_heatmap().values("math", "code", score)
    steps = Steps.of(values, score)
    known = [value for value in values.flatten().tolist() if value == value]
    assert steps.shade(worst(known))[0] == SHADES[-1]
    assert {steps.shade(value)[0] for value in known if value * worst(known) < 0} == {"·"}
    assert {steps.shade(value)[0] for value in known if value * worst(known) > 0} == set(SHADES)


def test_no_data_frozen_and_no_such_head_look_different() -> None:
    lines = plain(heatmap_panel(make_heatmap(), "math", "code", block="Q"))
    assert lines[2].strip("│ ").split()[1][2:4] == "//"
    assert lines[3].strip("│ ").split()[1] == "xxxxxxxx"
    assert "// no data   xx frozen" in "".join(lines)


@pytest.mark.parametrize("heads", [16, 64])
def test_number_over_a_column_is_its_head(heads: int) -> None:
    heatmap = make_heatmap(3, heads, heads)
    lines = plain(heatmap_panel(heatmap, "math", "code", "relative", "O"))
    width = 2 if heads <= 34 else 1
    numbers = [(match.start(), int(match.group())) for match in re.finditer(r"\d+", lines[1])]
    assert len(numbers) == heads * width // 8
    values = heatmap.values("math", "code", "relative")
    steps = Steps.of(values, "relative")
    marked = set("!+")
    for column, head in numbers:
        shade = steps.shade(float(values[0, head, 3]))[0]
        assert lines[2][column] in ({shade} if width == 2 else {shade} | marked)


def test_sample_pairs_are_named_even_where_an_identifier_is_longer_than_a_line() -> None:
    heatmap = make_heatmap()
    long = "/".join(f"part{i}" for i in range(30))
    pairs = (SamplePair("math", long, "code", "[b]", 2, 1, "V", 7.25),)
    lines = plain(details(replace(heatmap, pairs=pairs), select(heatmap, "math__code")))
    rows = [[part.strip() for part in line.split("│")[1:6]] for line in lines if line.count("│") == 6]
    found = next(index for index, row in enumerate(rows) if row[1:] == ["[b]", "L2.H1.V", "", "7.25"])
    assert "".join(row[0] for row in rows[found:])[: len(long)] == long


@pytest.mark.parametrize("heads", [4, 16, 32, 64])
def test_everything_fits_into_80_columns(heads: int) -> None:
    heatmap = make_heatmap(12, heads, heads)
    for shown in (
        details(heatmap, select(heatmap, top=10)),
        screen(heatmap, "runs/demo"),
        epoch_lines(heatmap),
    ):
        assert max(map(len, plain(shown))) <= 80
    text = "\n".join(plain(heatmap_panel(heatmap, "math", "code", block="O")))
    rows = [line for line in text.splitlines() if line.startswith(("│ 11 ", "│  2 "))]
    cells = heads * (2 if heads <= 34 else 1)
    assert [len(row.strip("│ ").split()[1]) for row in rows] == [cells, cells]


def test_tables_of_many_scores_hold_the_first_three_and_the_chosen_one_in_80_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heatmap = make_heatmap()
    more = dict.fromkeys(("more_one", "more_two", "more_three"), heatmap.scores["relative"])
    for name in more:
        monkeypatch.setitem(SCORES, name, replace(SCORES["relative"], name=name))
    heatmap = replace(
        heatmap,
        scores={**heatmap.scores, **more},
        standard_errors={
            **heatmap.standard_errors,
            **dict.fromkeys(more, heatmap.standard_errors["relative"]),
        },
    )
    for chosen, names in (
        ("loss_rise", ["loss_rise", "interference", "relative"]),
        ("more_two", ["loss_rise", "more_two", "interference"]),
    ):
        lines = plain(cells_table(heatmap, "math", "code", select(heatmap, score=chosen, top=2)))
        assert max(map(len, lines)) <= 80
        assert [name for name in lines[2].replace("┃", " ").split() if name in heatmap.scores] == names
    assert "| more_three |" in markdown_table(heatmap, "math", "code", select(heatmap, top=2))


def test_task_names_can_neither_break_the_line_nor_pass_for_markup() -> None:
    heatmap = make_heatmap(tasks=("[red]a\n", "b\x1b[2J"))
    for shown in (details(heatmap, select(heatmap)), screen(heatmap, "run"), epoch_lines(heatmap, "run")):
        text = "\n".join(plain(shown, 200))
        assert '"[red]a�"' in text
        assert "\x1b" not in text


def test_show_prints_pair_block_score_and_top_that_were_asked_for(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = qkov(monkeypatch, capsys, "show", run, "--pair", "code__math", "--block", "V", "--score", "cosine",
                "--top", 2)  # fmt: skip
    assert "code <- math: cosine" in text
    assert "math <- code" not in text
    heatmap = InterferenceHeatmap.load(run / "latest.json")
    lowest = [c.name for c in reversed(heatmap.cells("code", "math", "cosine")) if c.block == "V"][:2]
    assert [line.split()[1] for line in text.splitlines() if line.startswith("│ L")] == lowest
    assert "epoch 1, step 240" in text


def test_show_takes_a_step_and_a_pair_of_a_task_with_itself(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = qkov(monkeypatch, capsys, "show", run, "--step", 120, "--pair", "math__math")
    assert "math <- math: loss_rise" in text
    assert "epoch 0, step 120" in text


def test_csv_and_json_hold_every_cell_unrounded(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heatmap = InterferenceHeatmap.load(run / "latest.json")
    rows = list(csv.DictReader(io.StringIO(qkov(monkeypatch, capsys, "show", run, "--format", "csv"))))
    cells = [cell for pair in heatmap.verdict.pairs for cell in pair.cells]
    assert [(r["task_a"], r["block"], float(r["value"])) for r in rows] == [
        (c.task_a, c.block, c.value) for c in cells
    ]
    objects = json.loads(qkov(monkeypatch, capsys, "show", run, "--format", "json", "--top", 1))
    assert [one["value"] for one in objects] == [pair.cells[0].value for pair in heatmap.verdict.pairs]
    assert set(objects[0]) == set(COLUMNS)


def test_markdown_is_a_table_per_pair(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = qkov(monkeypatch, capsys, "show", run, "--format", "markdown")
    header = "| cell | layer | interference | relative | cosine | loss_rise |\n| --- | --- | --- | --- | --- | --- |\n"
    assert text.count(header) == 2
    assert text.count("| L") == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--pair", "maths"),
            r"^qkov: Unknown pair 'maths'; this heatmap has math__code, code__math, and each",
        ),
        (
            ("--score", "heat"),
            r"^qkov: Unknown score 'heat'; this heatmap has interference, relative, cosine",
        ),
        (("--step", 7), r"^qkov: No snapshot of step 7 in .*; there are 120, 240\.$"),
    ],
)
def test_what_the_run_does_not_have_is_refused_in_one_line(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple,
    message: str,
) -> None:
    with pytest.raises(SystemExit, match="2"):
        qkov(monkeypatch, capsys, "show", run, *arguments)
    assert re.search(message, capsys.readouterr().err)


def test_cells_file_has_every_pair_score_and_cell_with_data_and_its_samples(tmp_path: Path) -> None:
    heatmap = make_heatmap()
    heatmap.num_samples[1].fill_(40)
    write_tables(heatmap, tmp_path)
    rows = list(csv.DictReader((tmp_path / "cells.csv").read_text().splitlines()))
    # Two layers with data of 4 + 2 + 2 + 4 heads, one cell missing; 4 pairs with the controls; 4 scores.
    assert len(rows) == (2 * 12 - 1) * 4 * 4
    for row in rows:
        at = int(row["layer"]), int(row["head"]), "QKVO".index(row["block"])
        a, b, score = row["task_a"], row["task_b"], row["score"]
        assert float(row["value"]) == float(heatmap.values(a, b, score)[at])
        assert float(row["standard_error"]) == float(heatmap.errors(a, b, score)[at])
        assert (row["step"], row["epoch"]) == ("120", "3")
        samples = {"math": "50", "code": "40"}
        assert (row["num_samples_a"], row["num_samples_b"]) == (samples[a], samples[b])
    assert len({tuple(row.values())[2:9] for row in rows}) == len(rows)


def test_metrics_file_is_nested_numbers_only_and_leaves_out_what_has_no_data(tmp_path: Path) -> None:
    heatmap = make_heatmap()
    for values in heatmap.scores.values():
        values[..., 1] = float("nan")
    write_tables(heatmap, tmp_path)
    read = json.loads((tmp_path / "metrics.json").read_text())
    assert read == metrics(heatmap)
    values = heatmap.values("math", "code", "cosine")
    entry = read["math__code"]["cosine"]
    known = [v for v in values.flatten().tolist() if v == v]
    assert entry["mean"] == pytest.approx(sum(known) / len(known))
    assert (entry["min"], entry["max"]) == (min(known), max(known))
    assert list(entry["block_means"]) == ["Q", "V", "O"]


# Lightning's advice on data loaders and logging has nothing to do with the bar.
QUIET = pytest.mark.filterwarnings("ignore:.*(does not have many workers|logging interval).*")


def interference_tasks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TaskID, float, float]]:
    """Every task of that name in any Rich progress bar when it is hidden: which, its total and its state."""
    seen: list[tuple[TaskID, float, float]] = []
    update = Progress.update

    def spy(progress: Progress, task_id: TaskID, **fields: Any) -> None:
        task = next(task for task in progress.tasks if task.id == task_id)
        if task.description == "Interference" and fields.get("visible") is False:
            seen.append((task_id, task.total or 0, task.completed))
        update(progress, task_id, **fields)

    monkeypatch.setattr(Progress, "update", spy)
    return seen


@QUIET
def test_rich_bar_shows_one_task_that_every_heatmap_uses_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = interference_tasks(monkeypatch)
    train(InterferenceMonitor(every_n_steps=1), tmp_path, logger=False, callbacks=[RichProgressBar()],
          enable_progress_bar=True)  # fmt: skip
    assert [state for _, *state in seen] == [[4, 4], [4, 4]]  # four projections, two epochs
    assert len({task for task, *_ in seen}) == 1


@QUIET
def test_tqdm_bar_shows_the_task_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(InterferenceMonitor(every_n_steps=1), tmp_path, logger=False, callbacks=[TQDMProgressBar()],
          enable_progress_bar=True, max_epochs=1)  # fmt: skip
    assert "Interference:   0%|" in capsys.readouterr().out


@QUIET
@pytest.mark.parametrize("bar", [None, RichProgressBar(refresh_rate=0), TQDMProgressBar(refresh_rate=0)])
def test_nothing_is_shown_where_the_user_disabled_the_bar(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bar: ProgressBar | None,
) -> None:
    seen = interference_tasks(monkeypatch)
    train(InterferenceMonitor(every_n_steps=1), tmp_path, logger=False, callbacks=[bar] if bar else [],
          enable_progress_bar=bar is not None, max_epochs=1)  # fmt: skip
    assert seen == []
    assert "nterference" not in capsys.readouterr().out


def test_rows_that_are_selected_are_rows_of_the_cells_file() -> None:
    from qkov_lightning.views.tables import selected_rows

    heatmap = make_heatmap()
    every = set(cell_rows(heatmap))
    chosen = list(selected_rows(heatmap, select(heatmap, score="relative", block="K")))
    assert set(chosen) <= every
    assert len(chosen) == 2 * 4
