"""What ``qkov gate`` and its relatives promise to a build."""

import json
import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from qkov_lightning import InterferenceHeatmap, check_drift
from qkov_lightning.cli import main
from qkov_lightning.drift.reports import as_github, as_json, as_junit, as_markdown, as_text, github_annotation
from qkov_lightning.measure.cells import BlockInfo, Layer

TASKS = ("code", "math")
SHAPE = (2, 2, 2, 4, 4)


def make_heatmap(rise: float = 0.0, samples: int = 32, tasks: tuple = TASKS) -> InterferenceHeatmap:
    """Interference of math on code in layer 1, head 2, block V is higher by ``rise``."""
    blocks = {block: BlockInfo(f"{block}_proj", 4, 1, "measured") for block in "QKVO"}
    relative = torch.full(SHAPE, 1.0, dtype=torch.float64)
    relative[0, 1, 1, 2, 2] += rise
    scores = {"interference": relative.clone(), "relative": relative}
    scores["cosine"] = torch.full(SHAPE, 0.2, dtype=torch.float64)
    scores["loss_rise"] = torch.full(SHAPE, 0.1, dtype=torch.float64)
    return InterferenceHeatmap(
        tasks=tasks,
        layers=tuple(Layer(f"decoder.{i}.attn", blocks) for i in range(2)),
        scores=scores,
        standard_errors={name: torch.full(SHAPE, 0.05, dtype=torch.float64) for name in scores},
        num_samples=torch.full((2, 2, 4, 4), float(samples), dtype=torch.float64),
    )


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    make_heatmap().save("baseline.json")
    make_heatmap().save("same/latest.json")
    make_heatmap(rise=1.0).save("worse/latest.json")
    return tmp_path


def qkov(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    """Exit status of the command."""
    monkeypatch.setattr("sys.argv", ["qkov", *args])
    try:
        main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def test_a_build_without_drift_passes(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert qkov(monkeypatch, "gate", "same", "--baseline", "baseline.json") == 0
    assert "No interference drift" in capsys.readouterr().out


def test_a_build_with_drift_fails_and_names_layer_head_and_block(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert qkov(monkeypatch, "gate", "worse", "--baseline", "baseline.json") == 1
    output = capsys.readouterr().out
    assert "L1.H2.V (decoder.1.attn): relative of math pushing on code went from 1 to 2" in output
    assert "qkov baseline update worse --baseline baseline.json" in output


def test_the_gate_never_writes_the_baseline(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted((path, path.read_bytes(), path.stat().st_mtime_ns) for path in files.rglob("*.json"))
    qkov(monkeypatch, "gate", "worse", "--baseline", "baseline.json")
    qkov(monkeypatch, "gate", "worse", "--baseline", "absent.json")
    assert (
        sorted((path, path.read_bytes(), path.stat().st_mtime_ns) for path in files.rglob("*.json")) == before
    )


def test_the_printed_command_makes_the_next_build_pass(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    qkov(monkeypatch, "gate", "worse", "--baseline", "baseline.json")
    (command,) = (line.split() for line in capsys.readouterr().out.splitlines() if "qkov baseline" in line)
    assert qkov(monkeypatch, *command[1:]) == 0
    assert qkov(monkeypatch, "gate", "worse", "--baseline", "baseline.json") == 0


def test_paths_with_spaces_are_quoted_in_the_command(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    make_heatmap(rise=1.0).save("my run/latest.json")
    qkov(monkeypatch, "gate", "my run", "--baseline", "baseline.json")
    assert "qkov baseline update 'my run' --baseline baseline.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gate"], "required"),
        (["gate", "same", "--baseline", "baseline.json", "--format", "html"], "format"),
        (["gate", "same", "--baseline", "baseline.json", "--tolerance", "-1"], "expected tolerance >= 0"),
        (["gate", "nowhere", "--baseline", "baseline.json"], "No heatmap at nowhere"),
        (["diff", "same"], "required"),
    ],
)
def test_wrong_usage_exits_with_2(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, arguments: list, message: str
) -> None:
    assert qkov(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_compared_exits_with_3(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    make_heatmap(samples=4).save("few.json")
    make_heatmap(tasks=("code", "prose")).save("tasks.json")
    hole = make_heatmap()
    hole.scores["relative"][0, 1, 0, 0, 0] = math.nan
    hole.save("hole.json")
    Path("schema.json").write_text('{"schema": 99}')
    for name, message in {
        "few": "expected at least 16",
        "tasks": "has the tasks",
        "hole": "Missing data is not 'no drift'",
        "schema": "heatmap schema 99",
        "absent": "qkov baseline update same --baseline absent.json",
    }.items():
        assert qkov(monkeypatch, "gate", "same", "--baseline", f"{name}.json") == 3
        assert message in capsys.readouterr().out
        if name != "absent":
            assert qkov(monkeypatch, "gate", f"{name}.json", "--baseline", "baseline.json") == 3
            assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tasks", ["code"]),
        ("tasks", ["code", "math", "prose"]),
        ("layers", []),
        ("num_samples", [3, 3]),
        ("num_samples", None),
        ("scores", {"relative": [[1.0]], "cosine": [[1.0]]}),
        ("scores", {}),
        ("standard_errors", {"relative": 1.0}),
        ("replicates", {"relative": [1.0, 2.0]}),
        ("notes", None),
        ("notes", {"degrees_of_freedom": "many"}),
        ("notes", {"degrees_of_freedom": 0}),
        ("blocks", 3),
    ],
)
@pytest.mark.parametrize("which", ["baseline", "run"])
def test_a_damaged_file_is_never_taken_for_drift(
    files: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: object, which: str
) -> None:
    data = json.loads(make_heatmap().to_json())
    data[key] = value
    Path("damaged.json").write_text(json.dumps(data))
    pair = ("same", "damaged.json") if which == "baseline" else ("damaged.json", "baseline.json")
    status = qkov(monkeypatch, "gate", pair[0], "--baseline", pair[1])
    assert status == (0 if key == "blocks" else 3)


def test_every_format_says_the_same(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = ("gate", "worse", "--baseline", "baseline.json", "--format")
    assert qkov(monkeypatch, *arguments, "markdown") == 1
    assert "| L1.H2.V | decoder.1.attn | relative | math | code | 1 | 2 |" in capsys.readouterr().out
    assert qkov(monkeypatch, *arguments, "json") == 1
    data = json.loads(capsys.readouterr().out)
    assert data["drifted"] is True
    assert data["findings"][0]["layer_name"] == "decoder.1.attn"
    assert data["update_command"] == "qkov baseline update worse --baseline baseline.json"
    assert qkov(monkeypatch, *arguments, "github") == 1
    assert capsys.readouterr().out.startswith("::error title=Interference drift%3A L1.H2.V::L1.H2.V (decoder")


@pytest.mark.parametrize("format", ["text", "markdown", "json", "github"])
def test_a_refusal_reads_in_every_format(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, format: str
) -> None:
    assert qkov(monkeypatch, "gate", "same", "--baseline", "absent.json", "--format", format) == 3
    output = capsys.readouterr().out
    assert "No baseline can be read" in output
    if format == "json":
        assert json.loads(output)["drifted"] is None
    if format == "github":
        assert output.startswith("::error title=Interference was not compared::")


def test_the_step_summary_is_appended_to(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = files / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    qkov(monkeypatch, "gate", "worse", "--baseline", "baseline.json")
    qkov(monkeypatch, "gate", "worse", "--baseline", "absent.json")
    text = summary.read_text()
    assert text.startswith("before\n### Interference drifted\n")
    assert "### Interference was not compared" in text


def test_junit_has_a_case_per_pair_and_score(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for run, counts in {"same": ("5", "0", "0"), "worse": ("5", "1", "0")}.items():
        qkov(monkeypatch, "gate", run, "--baseline", "baseline.json", "--junitxml", "out/gate.xml")
        suite = ElementTree.parse("out/gate.xml").getroot()[0]
        assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == counts
    (failed,) = (case for case in suite if case.find("failure") is not None)
    assert failed.get("name") == "relative: code <- math"
    assert "L1.H2.V" in failed.find("failure").text
    qkov(monkeypatch, "gate", "same", "--baseline", "absent.json", "--junitxml", "out/gate.xml")
    assert ElementTree.parse("out/gate.xml").getroot()[0].get("errors") == "1"


def test_diff_informs_and_exits_with_0(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert qkov(monkeypatch, "diff", "same", "worse") == 0
    output = capsys.readouterr().out
    assert "L1.H2.V" in output
    assert "baseline update" not in output
    make_heatmap(tasks=("code", "prose")).save("tasks.json")
    assert qkov(monkeypatch, "diff", "same", "tasks.json") == 0
    assert "has the tasks" in capsys.readouterr().out


def test_at_most_ten_annotations() -> None:
    current = make_heatmap()
    current.scores["relative"][0, 1] += 2.0
    output = as_github(check_drift(make_heatmap(), current), "")
    assert output.count("::error") == 10
    assert "L1.H3.O" in output


def test_annotations_are_escaped() -> None:
    assert (
        github_annotation("a: b, c", "100%\r\n::error::x")
        == "::error title=a%3A b%2C c::100%25%0D%0A::error::x\n"
    )


def test_hostile_names_break_no_format() -> None:
    names = ("a|b\n::error::x", "<b>\x1b[31m]]>")
    baseline = replace(make_heatmap(), tasks=names)
    report = check_drift(baseline, replace(make_heatmap(rise=1.0), tasks=names))
    ElementTree.fromstring(as_junit(report).encode())
    json.loads(as_json(report, ""))
    assert not any(line.startswith("::error::x") for line in as_github(report, "").splitlines())
    (row,) = (line for line in as_markdown(report, "").splitlines() if line.startswith("| L1.H2.V"))
    assert row.count("|") - row.count("\\|") == 11
    assert "<b>" not in row
    assert "\x1b" not in as_text(report, "")


def test_a_long_report_says_how_much_it_leaves_out() -> None:
    current = make_heatmap()
    current.scores["relative"][0, 1] += 2.0
    current.scores["relative"][1, 0] += 2.0
    report = check_drift(make_heatmap(), current)
    assert len(report.findings) == 2 * (32 + 4 + 1)
    for text in (as_text(report, ""), as_markdown(report, "")):
        assert "and 24 more" in text


def test_a_report_says_whether_the_samples_were_the_same() -> None:
    notes = {"samples": "f00d"}
    replicates = {
        name: torch.ones(4, *SHAPE, dtype=torch.float64) for name in ("loss_rise", "relative", "cosine")
    }
    same = replace(make_heatmap(), notes=notes, replicates=replicates)
    assert "32 samples in the baseline, 32 now (the same samples)." in as_text(check_drift(same, same), "")
    other = replace(same, notes={"samples": "beef"})
    assert "32 now (other samples)." in as_markdown(check_drift(same, other), "")
