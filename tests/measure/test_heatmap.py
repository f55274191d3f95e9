"""The result object: exact JSON, the summary, refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from qkov_lightning import HeatmapError, InterferenceHeatmap
from qkov_lightning.measure.cells import BlockInfo, Layer, SamplePair
from qkov_lightning.measure.names import pair_key, pair_label, printable, safe_name


def heatmap() -> InterferenceHeatmap:
    """Two layers, four query heads, two key-value heads; the K block of layer 1 is frozen."""
    layers = tuple(
        Layer(
            f"layers.{index}.self_attn",
            {
                block: BlockInfo(
                    f"layers.{index}.{block}", 2 if block in "KV" else 4, 2 if block in "KV" else 1,
                    "frozen" if (index, block) == (1, "K") else "measured",
                )
                for block in "QKVO"
            },
        )
        for index in range(2)
    )  # fmt: skip
    values = torch.rand(2, 2, 2, 4, 4, dtype=torch.float64) / 3
    values[:, :, :, 2:, 1:3] = torch.nan
    values[:, :, 1, :, 1] = torch.nan
    values[..., 3] += 0.3  # O interferes most
    values[0, 1, 1, 3, 3] = 0.9
    return InterferenceHeatmap(
        tasks=("math", "code"),
        layers=layers,
        scores={"loss_rise": values - 0.3, "interference": values, "relative": values * 2},
        standard_errors={"loss_rise": values / 9, "interference": values / 10, "relative": values / 7},
        num_samples=torch.full((2, 2, 4, 4), 17.0, dtype=torch.float64),
        step=120,
        epoch=3,
        pairs=(SamplePair("math", "7", "code", "23", 15, 8, "O", 0.1),),
        notes={"captured_steps": 12},
    )


def test_json_gives_back_exactly_the_same_numbers(tmp_path: Path) -> None:
    original = heatmap()
    original.save(tmp_path / "deep" / "latest.json")
    read = InterferenceHeatmap.load(tmp_path / "deep" / "latest.json")
    for name in ("scores", "standard_errors"):
        for score, values in getattr(original, name).items():
            torch.testing.assert_close(getattr(read, name)[score], values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(read.num_samples, original.num_samples)
    assert (read.tasks, read.layers, read.pairs) == (original.tasks, original.layers, original.pairs)
    assert (read.step, read.epoch, read.notes) == (120, 3, {"captured_steps": 12})
    assert read.to_json() == original.to_json()


def test_json_is_standard_and_missing_data_is_null() -> None:
    data = json.loads(heatmap().to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert data["scores"]["interference"][0][1][1][0][1] is None


def test_the_summary_is_the_dictionary_people_know() -> None:
    original = heatmap()
    summary = original.summary("math", "code")
    assert summary["tasks_compared"] == ["math", "code"]
    assert (summary["num_layers"], summary["num_heads"]) == (2, 4)
    assert summary["heatmap_shape"] == dict.fromkeys("QKVO", (2, 4))
    assert summary["max_interference"] == 0.9
    assert summary["max_location"] == {
        "layer": 1,
        "layer_name": "layers.1.self_attn",
        "head": 3,
        "block": "O",
    }
    assert summary["most_conflicted_block"] == "O"
    query = original.values("math", "code")[:, :, 0]
    assert summary["block_means"]["Q"] == pytest.approx(float(query.mean()), rel=1e-12)


def test_a_block_without_data_has_no_mean_rather_than_zero() -> None:
    original = heatmap()
    original.scores["interference"][..., 1] = torch.nan
    summary = original.summary("math", "code")
    assert summary["block_means"]["K"] is None
    original.scores["interference"][:] = torch.nan
    assert original.summary("math", "code")["max_interference"] is None


def test_shared_key_value_heads_are_repeated_for_their_query_heads() -> None:
    original = heatmap()
    native, expanded = original.values("math", "code"), original.per_query_head("math", "code")
    assert torch.equal(expanded[0, :, 1], native[0, [0, 0, 1, 1], 1])
    assert expanded[1, :, 1].isnan().all()
    assert torch.equal(expanded[:, :, 3], native[:, :, 3])


def test_cells_come_hottest_first_and_only_with_data() -> None:
    cells = heatmap().cells("math", "code")
    assert cells[0].name == "L1.H3.O"
    assert [cell.value for cell in cells] == sorted((cell.value for cell in cells), reverse=True)
    assert not any(math.isnan(cell.value) for cell in cells)
    assert len(cells) == 2 * (4 + 4) + 2 + 2 * 2


def test_of_many_task_pairs_the_first_twelve_of_the_verdict_are_shown() -> None:
    original = heatmap()
    assert set(original.shown_pairs) == set(original.task_pairs)
    tasks = tuple(f"task-{index}" for index in range(6))
    values = torch.rand(6, 6, 2, 4, 4, dtype=torch.float64)
    values[5, 2, 1, 3, 0] = 7.0
    many = dataclasses.replace(
        original,
        tasks=tasks,
        scores={"interference": values, "loss_rise": values},
        standard_errors={"loss_rise": 0.5 + 0 * values},
        num_samples=9 * torch.ones(6, 2, 4, 4),
    )
    assert len(many.shown_pairs) == 12
    assert many.shown_pairs[0] == ("task-5", "task-2")


def test_a_sample_pair_reads_as_a_sentence() -> None:
    assert str(heatmap().pairs[0]) == "code sample 23 interferes with math sample 7 in L15.H8.O"


def test_a_task_never_seen_is_refused() -> None:
    with pytest.raises(ValueError, match="Task 'poetry' was never seen; this heatmap has 'math', 'code'"):
        heatmap().summary("math", "poetry")
    with pytest.raises(
        ValueError, match="Unknown score 'x'; this heatmap has loss_rise, interference, relative"
    ):
        heatmap().values("math", "code", "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "schema None, expected 2"),
        ('{"schema": 99}', "schema 99, expected 2"),
        ('{"schema": 2}', "not an interference heatmap: KeyError"),
        (
            '{"schema": 2, "scores": {"heat": []}}',
            "unknown score 'heat'; this version knows loss_rise, relative, cosine, conflict, interference, forgetting",
        ),
    ],
)
def test_a_file_that_is_no_heatmap_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "latest.json"
    path.write_text(text)
    with pytest.raises(HeatmapError, match=message) as caught:
        InterferenceHeatmap.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["math", "a/b", "../../etc", ".hidden", "💡", "x" * 500, "", "a\nb", "a b"])
def test_any_task_name_makes_a_safe_and_distinct_file_name(name: str) -> None:
    safe = safe_name(name)
    assert len(safe) < 80
    assert "/" not in safe
    assert not safe.startswith(".")
    assert safe.isascii()
    assert safe_name(name + "!") != safe


def test_control_characters_never_reach_the_terminal() -> None:
    assert "\x1b" not in printable("\x1b[31mred\r")


def test_in_a_notebook_it_shows_the_answer_and_the_overview_and_elsewhere_one_line() -> None:
    original = heatmap()
    assert len(repr(original)) < 120
    for task in original.tasks:
        assert repr(task) in repr(original)
    shown = original._repr_html_()
    assert "data:image/png;base64," in shown
    assert "of" in shown.partition("<img")[0]
    assert len(repr(original.verdict)) < 2000


def test_a_pair_of_tasks_is_its_verdict() -> None:
    original = heatmap()
    assert original["math", "code"] == original.verdict.pair("math", "code")
    control = original["math", "math"]
    assert (control.task_a, control.task_b) == ("math", "math")
    assert {cell.name for cell in control.cells} == {
        cell.name for cell in original.cells("math", "math", "loss_rise")
    }
    with pytest.raises(KeyError, match="poetry <- math: this heatmap has"):
        original["poetry", "math"]


def test_it_plots_all_pairs_or_one_and_refuses_half_a_pair() -> None:
    original = heatmap()
    assert len(original.plot().axes[0].texts) == len(original.task_pairs)
    assert original.plot("math", "code", "relative")._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="expected both tasks of a pair, or nothing"):
        original.plot("math")


def test_a_frame_has_a_row_for_every_cell_pair_and_score(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    original = heatmap()
    frame = original.to_frame()
    for a in original.tasks:
        for b in original.tasks:
            for score in original.scores:
                own = frame[(frame.task_a == a) & (frame.task_b == b) & (frame.score == score)]
                assert sorted(own.value) == sorted(cell.value for cell in original.cells(a, b, score))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"to_frame needs pandas.*pip install pandas"):
        original.to_frame()


def test_task_names_that_read_badly_in_a_sentence_are_quoted() -> None:
    assert pair_label("math", "word problems") == 'math <- "word problems"'
    assert pair_label("0", "résumé-v1.2") == '"0" <- résumé-v1.2'
    assert pair_key("math", "word problems").startswith("math__word_problems-")
