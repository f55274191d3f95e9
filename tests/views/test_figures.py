"""The figure shows every cell where it is, on one scale, and says what is missing."""

import itertools

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from synthetic import make_heatmap

from qkov_lightning import EmpiricalFisher, HeadInterference
from qkov_lightning.scores.scores import SCORES
from qkov_lightning.views.facets import scale_of
from qkov_lightning.views.figures import heatmap_figure, score_scale
from qkov_lightning.views.marks import differs_from_control, marks_of
from qkov_lightning.views.overview import overview
from qkov_lightning.views.page import render

COLUMNS = (0, 5, 8, 11)
"""First column of Q, K, V and O on the axis: four heads, two, two and four, a blank between."""


def test_facets_have_widths_by_head_count_and_layer_0_on_top() -> None:
    axis = heatmap_figure(make_heatmap(), "math", "code").axes[0]
    assert axis.images[0].get_array().shape == (3, 4 + 1 + 2 + 1 + 2 + 1 + 4)
    assert axis.get_ylim() == (2.5, -0.5)
    blocks = {text.get_text(): text.get_position()[0] for text in axis.texts}
    assert blocks == {"Q": 1.5, "K": 5.5, "V": 8.5, "O": 12.5}
    heads = [label.get_text() for label in axis.get_xticklabels()]
    assert heads == ["0", "1", "2", "3", "0", "1", "0", "1", "0", "1", "2", "3"]


def test_every_cell_has_the_colour_of_its_own_value() -> None:
    heatmap = make_heatmap()
    values = heatmap.values("math", "code", "relative")
    figure = heatmap_figure(heatmap, "math", "code", "relative")
    axis = figure.axes[0]
    shown = axis.images[0].get_array().filled(np.nan)
    for block, (first, heads) in enumerate(zip(COLUMNS, (4, 2, 2, 4), strict=True)):
        np.testing.assert_array_equal(shown[:, first : first + heads], values[:, :heads, block])
    image = render(figure)
    # A quarter off the centre: the mark is in the middle.
    x, y = axis.transData.transform((COLUMNS[3] + 3 - 0.25, 2 - 0.25))
    expected = 255 * np.array(colormaps["magma"](float(values[2, 3, 3]) / 2))[:3]
    np.testing.assert_allclose(image[image.shape[0] - 1 - int(y), int(x)], expected, atol=2)


@pytest.mark.parametrize("score", ["relative", "cosine"])
def test_scale_of_a_score_with_a_natural_range_is_the_same_at_every_epoch(score: str) -> None:
    early, late = make_heatmap(seed=0), make_heatmap(seed=1, step=240)
    assert score_scale(early, score) == score_scale(late, score)
    for axis in heatmap_figure(early, "math", "code", score).axes:
        assert axis.images[0].get_clim() == ((-1.0, 1.0) if score == "cosine" else (0.0, 2.0))


def test_scale_in_units_spans_all_pairs_of_the_heatmap() -> None:
    heatmap = make_heatmap(tasks=("math", "code", "prose"))
    largest = max(float(heatmap.values(a, b).nan_to_num(0).max()) for a, b in heatmap.task_pairs)
    assert score_scale(heatmap, "interference").high == largest


def test_red_is_the_end_that_interferes_and_signed_scores_have_zero_in_the_middle() -> None:
    for score in SCORES.values():
        scale = scale_of(score.name, num_tasks=3, largest=4.0)
        if not score.signed:
            assert scale.colormap == "magma"
            continue
        assert scale.low == -scale.high
        red, _, blue, _ = colormaps[scale.colormap](0.0 if score.falling else 1.0)
        assert red > blue


def test_frozen_and_no_data_are_hatched_differently_and_heads_that_do_not_exist_are_white() -> None:
    axis = heatmap_figure(make_heatmap(), "math", "code").axes[0]
    hatched = {
        collection.get_hatch(): {
            tuple(path.get_extents().get_points().mean(axis=0)) for path in collection.get_paths()
        }
        for collection in axis.collections
        if collection.get_hatch()
    }
    assert hatched["////"] == {(1.0, 0.0)}
    real = [*range(4), 5, 6, 8, 9, *range(11, 15)]
    assert hatched["xxxx"] == {(float(column), 1.0) for column in real}


def test_mark_is_on_cells_beyond_three_combined_standard_errors_of_the_control() -> None:
    heatmap = make_heatmap()
    a, b = 0, 1
    marked = differs_from_control(heatmap, "math", "code", "relative")
    for layer, head, block in np.ndindex(3, 4, 4):
        pair = float(heatmap.scores["relative"][a, b, layer, head, block])
        control = float(heatmap.scores["relative"][a, a, layer, head, block])
        assert bool(marked[layer, head, block]) == (abs(pair - control) > 3 * (0.05**2 + 0.05**2) ** 0.5)
    marks = marks_of(heatmap, "math", "code", "relative")
    assert torch.equal(marks != 0, marked)
    assert torch.equal(
        marks > 0,
        marked & (heatmap.values("math", "code", "relative") > heatmap.values("math", "math", "relative")),
    )
    dots, rings = drawn(heatmap_figure(heatmap, "math", "code", "relative").axes[0])
    assert dots == on_axis(marks > 0)
    assert rings == on_axis(marks < 0)
    assert dots
    assert rings


def drawn(axis: Axes) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """(row, column) of the dots and of the rings."""
    found: list[set[tuple[int, int]]] = [set(), set()]
    for collection in axis.collections:
        if isinstance(collection, PathCollection):
            ring = not len(collection.get_facecolors())
            found[ring] |= {(int(y), int(x)) for x, y in collection.get_offsets()}
    return found[0], found[1]


def on_axis(cells: torch.Tensor) -> set[tuple[int, int]]:
    return {(layer, COLUMNS[block] + head) for layer, head, block in cells.nonzero().tolist()}


@pytest.mark.parametrize("score", ["loss_rise", "cosine"])
def test_marks_of_a_score_with_a_sign_are_its_sure_cells(score: str) -> None:
    heatmap = make_heatmap()
    next(iter(heatmap.standard_errors.values())).mul_(4)  # all scores share them
    dots, rings = drawn(heatmap_figure(heatmap, "math", "code", score).axes[0])
    values, error = heatmap.values("math", "code", score), 0.2
    harm = -values if score == "cosine" else values
    # What is marked is beyond two errors at least, and what is beyond four is marked.
    assert on_axis(harm > 4 * error) <= dots <= on_axis(harm > 2 * error)
    assert on_axis(harm < -4 * error) <= rings <= on_axis(harm < -2 * error)
    assert dots
    assert rings
    if score == "loss_rise":
        names = {cell.name for cell in heatmap["math", "code"].harmful}
        assert len(names) == len(dots)


def test_title_says_pair_epoch_step_and_samples() -> None:
    texts = " ".join(text.get_text() for text in heatmap_figure(make_heatmap(), "math", "code").texts)
    for part in ("loss_rise: math <- code", "epoch 3", "step 120", "math 50, code 50"):
        assert part in texts


@pytest.mark.parametrize(("layers", "heads", "kv_heads"), [(28, 16, 8), (80, 64, 64)])
def test_labels_do_not_overlap_and_fit_in_the_picture(layers: int, heads: int, kv_heads: int) -> None:
    figure = heatmap_figure(make_heatmap(layers, heads, kv_heads), "math", "code", "relative")
    image = render(figure)
    assert max(image.shape) <= 3000
    for axis in figure.axes[:1]:
        for labels, edge in ((axis.get_xticklabels(), "x"), (axis.get_yticklabels(), "y")):
            boxes = sorted(
                (getattr(box, f"{edge}0"), getattr(box, f"{edge}1"))
                for box in (label.get_window_extent() for label in labels if label.get_text())
            )
            assert all(first[1] <= second[0] for first, second in itertools.pairwise(boxes))
    for text in figure.texts:
        box = text.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= image.shape[1]


def test_long_task_names_take_more_lines_and_stay_in_the_picture() -> None:
    tasks = ("natural language inference, translated", "extractive question answering over tables")
    figure = heatmap_figure(make_heatmap(heads=2, tasks=tasks), *tasks, "relative")
    image = render(figure)
    boxes = [text.get_window_extent() for text in figure.texts]
    assert all(box.x0 >= 0 and box.x1 <= image.shape[1] for box in boxes)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    facet = figure.axes[0].get_tightbbox()
    assert not any(box.overlaps(facet) for box in boxes)


def test_a_heatmap_without_any_data_draws() -> None:
    heatmap = make_heatmap()
    for values in heatmap.scores.values():
        values.fill_(torch.nan)
    assert render(heatmap_figure(heatmap, "math", "code")).shape[2] == 3


def test_the_overview_sums_the_blocks_of_every_head_and_shares_out_what_heads_share() -> None:
    heatmap = make_heatmap(tasks=("math", "code", "prose"))
    figure = overview(heatmap)
    axis = figure.axes[0]
    shown = axis.images[0].get_array().filled(np.nan)
    titles = {text.get_text(): text.get_position() for text in axis.texts}
    assert set(titles) == {f"{a} <- {b}" for a, b in heatmap.task_pairs}
    for a, b in heatmap.task_pairs:
        middle, above = titles[f"{a} <- {b}"]
        first = int(middle - 1.5)
        row = next(r for r in range(len(shown)) if r - 0.5 > above)
        values = heatmap.values(a, b, "loss_rise")
        for layer, head in np.ndindex(3, 4):
            own = [values[layer, head, 0], values[layer, head // 2, 1] / 2,
                   values[layer, head // 2, 2] / 2, values[layer, head, 3]]  # fmt: skip
            known = [float(value) for value in own if value == value]
            expected = sum(known) if known else np.nan
            part = next((p for p in heatmap[a, b].heads if p.name == f"L{layer}.H{head}"), None)
            assert part is None or part.rise == pytest.approx(expected)
            clear = part is None or abs(expected) >= 2 * 0.05 * sum(value == value for value in own) - 1e-9
            # Errors of cells add up, those of shared heads in parts: what is clear by the sum is drawn.
            if clear or shown[row + layer, first + head] != 0:
                np.testing.assert_allclose(shown[row + layer, first + head], expected)


@pytest.mark.parametrize(("num_tasks", "panels"), [(1, 1), (2, 2), (4, 12), (7, 12)])
def test_the_overview_of_few_and_of_many_tasks_stays_in_the_picture(num_tasks: int, panels: int) -> None:
    tasks = tuple(f"a task with a long name {index}" for index in range(num_tasks))
    figure = overview(make_heatmap(layers=12, heads=12, kv_heads=12, tasks=tasks))
    image = render(figure)
    assert len(figure.axes[0].texts) == panels
    boxes = [text.get_window_extent() for text in (*figure.texts, *figure.axes[0].texts)]
    assert all(box.x0 >= 0 and box.x1 <= image.shape[1] and box.y0 >= 0 for box in boxes)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def _metric() -> HeadInterference:
    gradients = torch.randn(8, 2, 6)
    tasks = ["math"] * 4 + ["code"] * 4
    fisher = EmpiricalFisher()
    fisher.update(gradients, tasks)
    metric = HeadInterference(["math", "code"], num_layers=3, num_heads=2)
    metric.update(gradients, tasks, fisher.pooled(), layer=0, block="K")
    return metric


def test_metric_plot_returns_figure_and_axis_and_shows_what_compute_gives() -> None:
    metric = _metric()
    figure, axis = metric.plot()
    assert isinstance(figure, Figure)
    assert isinstance(axis, Axes)
    shown = axis.images[0].get_array()
    # Q takes columns 0 and 1, then a blank, then K.
    np.testing.assert_array_equal(shown[0, 3:5], metric.compute()["relative"][0, 1, 0, :, 1])
    assert axis.get_title() == "relative: math <- code"
    matplotlib.pyplot.close(figure)


def test_metric_plot_draws_on_the_axis_that_it_is_given_and_the_value_that_it_is_given() -> None:
    metric = _metric()
    figure = Figure()
    axis = figure.add_subplot()
    value = {name: 0 * values for name, values in metric.compute().items()}
    assert metric.plot(value, axis, score="cosine", pair=("code", "math")) == (figure, axis)
    assert axis.images[0].get_array()[0, 3] == 0
    assert axis.get_title() == "cosine: code <- math"


def test_metric_plot_refuses_an_unknown_score_or_task() -> None:
    with pytest.raises(
        ValueError,
        match="Unknown score 'heat'; there are loss_rise, relative, cosine, conflict, interference, forgetting",
    ):
        _metric().plot(score="heat")
    with pytest.raises(ValueError, match="Unknown task 'poetry'"):
        _metric().plot(pair=("math", "poetry"))
