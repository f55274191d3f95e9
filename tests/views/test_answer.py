"""Every view gives the same answer: of a recorded heatmap, the same worst cell, its error and its verb."""

from __future__ import annotations

import csv
import html
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console, RenderableType
from synthetic import make_heatmap

from qkov_lightning import InterferenceHeatmap, cli, find_projections
from qkov_lightning.measure.names import pair_key, pair_label
from qkov_lightning.stepping import worst_cells
from qkov_lightning.views.answer import answer, headline, next_steps, plus_minus
from qkov_lightning.views.interactive import interactive_heatmap
from qkov_lightning.views.loggers import _markdown
from qkov_lightning.views.marks import marks_of
from qkov_lightning.views.notebook import to_html
from qkov_lightning.views.publication import Publication, charts, scalars
from qkov_lightning.views.report import write_report
from qkov_lightning.views.runs import RunHistory
from qkov_lightning.views.screen import epoch_lines, screen
from qkov_lightning.views.tables import select, selected_rows
from qkov_lightning.views.terminal import details

RECORDED = Path(__file__).parent / "recorded.json"
HEATMAP = InterferenceHeatmap.load(RECORDED)
"""The demo's own, of three tasks; the numbers have four digits."""

PAIR = ("code", "prose")
CELL, VALUE, ERROR = "L0.H0.V", 0.001638, 0.0003359
"""The worst cell, read off in the file: of the cells beyond doubt, the largest."""

WITH_ERROR = "+0.0016 ± 0.0003"


def plain(renderable: RenderableType, width: int = 80) -> list[str]:
    console = Console(width=width, color_system=None, file=io.StringIO(), legacy_windows=False)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get().splitlines()


def first_cell(text: str) -> str:
    """The first name of a cell in a text."""
    found = re.search(r"L\d+\.H\d+\.[QKVO]", text)
    assert found
    return found[0]


def test_the_verdict_names_it() -> None:
    worst = HEATMAP.verdict.harmful[0]
    assert (worst.name, worst.task_a, worst.task_b) == (CELL, *PAIR)
    assert (worst.value, worst.standard_error) == pytest.approx((VALUE, ERROR), rel=1e-3)
    assert HEATMAP.verdict.pairs[0].cells[0] == worst
    assert HEATMAP.shown_pairs[0] == PAIR


@pytest.mark.parametrize(
    "lines",
    [
        plain(screen(HEATMAP, "runs/demo")),
        plain(epoch_lines(HEATMAP, "runs/demo")),
        plain(details(HEATMAP, select(HEATMAP, pair_key(*PAIR), top=10))),
        plain(details(HEATMAP, select(HEATMAP, top=10))),
        _markdown(HEATMAP).splitlines(),
        answer(HEATMAP),
        [html.unescape(to_html(HEATMAP).partition("<img")[0])],
    ],
    ids=["show", "epoch", "show --pair", "show --all", "tensorboard", "answer", "notebook"],
)
def test_every_text_names_it_first_with_its_error_and_its_verb(lines: list[str]) -> None:
    text = "\n".join(lines)
    assert first_cell(text) == CELL
    before, _, after = text.partition(CELL)
    assert pair_label(*PAIR) in before + after.split("\n")[0]
    assert re.search(re.escape(WITH_ERROR), after)
    assert "hurt" in text
    assert "surely hurt" in before + after


def test_every_format_of_show_lists_it_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for form in ("json", "csv", "markdown", "table"):
        monkeypatch.setattr("sys.argv", ["qkov", "show", str(RECORDED), "--format", form])
        monkeypatch.setenv("COLUMNS", "80")
        cli.main()
        text = capsys.readouterr().out
        if form in {"json", "csv"}:
            row = json.loads(text)[0] if form == "json" else next(csv.DictReader(text.splitlines()))
            assert (row["task_a"], row["task_b"], f"L{row['layer']}.H{row['head']}.{row['block']}") == (
                *PAIR,
                CELL,
            )
            assert float(row["standard_error"]) == pytest.approx(ERROR, rel=1e-3)
        else:
            assert first_cell(text) == CELL
    assert next(iter(selected_rows(HEATMAP, select(HEATMAP))))[4:8] == (0, HEATMAP.layers[0].name, 0, "V")


def test_the_page_opens_on_it(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    write_report([RunHistory("demo", (HEATMAP,))], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    run = json.loads(page.split('type="application/json">')[1].split("</script>")[0])["runs"][0]
    said = run["frames"][0]["answer"]
    assert said["headline"] == headline(HEATMAP.verdict)
    assert (said["worst"][0]["name"], said["worst"][0]["value"]) == (CELL, WITH_ERROR)
    assert said["worst"][0]["verb"] == "hurts"
    assert run["pairs"][said["worst"][0]["pair"]]["label"] == run["pairs"][0]["label"] == pair_label(*PAIR)
    assert run["frames"][0]["order"][0][0] == CELL
    figure = interactive_heatmap(HEATMAP, *PAIR)
    assert figure.data[4].text[0][0] == "●"  # of V, layer 0, head 0


def test_pictures_and_scalars_begin_with_it() -> None:
    images = list(Publication.of(HEATMAP).images)
    assert images[:2] == ["_overview", f"pair/loss_rise_{pair_key(*PAIR)}"]
    assert len(images) <= 6
    assert sorted(images) == ["_overview", *sorted(images[1:])]
    assert marks_of(HEATMAP, *PAIR, "loss_rise")[0, 0, 2] == 1
    numbers = scalars(HEATMAP)
    assert len(charts(HEATMAP)) <= 10
    assert max(charts(HEATMAP)[3:], key=numbers.__getitem__) == f"{pair_key(*PAIR)}/rise"
    assert numbers["harmful_cells"] == len(HEATMAP.verdict.harmful)


def test_callbacks_choose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    from byte_model import ByteDecoder

    projections = find_projections(torch.nn.ModuleDict({"decoder": ByteDecoder()}))
    names, _ = worst_cells(HEATMAP, projections, pair_key(*PAIR), top=3)
    assert names[0] == CELL
    assert any(CELL in command for _, command in next_steps(HEATMAP, "run"))


def test_no_sure_harm_is_an_answer_of_its_own() -> None:
    heatmap = make_heatmap()
    next(iter(heatmap.standard_errors.values())).fill_(10.0)
    verdict = heatmap.verdict
    assert not verdict.harmful
    text = "\n".join([*plain(screen(heatmap, "run"), 100), *plain(epoch_lines(heatmap), 100)])
    assert "No cell does sure harm: of 46 cells" in text or f"of {verdict.num_cells} cells" in text
    assert "no sure harm" in text
    assert "Largest rises, none of them sure" in text
    assert "HeadFreezer" not in text
    largest = max((cell for pair in verdict.pairs for cell in pair.cells), key=lambda cell: cell.value)
    assert first_cell(text) == largest.name


def test_no_data_is_an_answer_of_its_own() -> None:
    heatmap = make_heatmap()
    for values in heatmap.scores.values():
        values.fill_(torch.nan)
    text = "\n".join([*plain(screen(heatmap, "run")), *plain(epoch_lines(heatmap)), to_html(heatmap)])
    assert "No cell has data of two tasks yet." in text
    assert "no data" in text


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("long", [False, True])
def test_the_screen_has_23_lines_of_80_and_an_epoch_at_most_6(num_tasks: int, long: bool) -> None:
    names = [f"a much longer name of a task {i}" if long else f"task{i}" for i in range(num_tasks)]
    heatmap = make_heatmap(layers=4, heads=8, kv_heads=4, tasks=tuple(names))
    lines = plain(screen(heatmap, "runs/demo/version_0/interference"))
    assert len(lines) <= (27 if long else 23)  # long commands are folded, never cut
    assert max(map(len, lines)) <= 80
    epoch = plain(epoch_lines(heatmap, "runs/demo/version_0/interference"))
    assert len(epoch) <= 6
    assert max(map(len, epoch)) <= 80


def test_plus_minus_rounds_to_the_error() -> None:
    assert plus_minus(VALUE, ERROR, signed=True) == WITH_ERROR


def test_the_command_lists_its_commands_without_loading_torch() -> None:
    code = "import sys; sys.argv = ['qkov', '--help']; from qkov_lightning.cli import main; main(); print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert result.stdout.endswith("False\n")
    for command in cli.COMMANDS:
        assert f"qkov {command} " in result.stdout
