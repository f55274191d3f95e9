"""The figure shows every cell where it is, on one scale, and says what is missing."""

import itertools

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from synthetic import make_heatmap

from qkov_lightning import EmpiricalFisher, HeadInterference
from qkov_lightning.scores.scores import SCORES
from qkov_lightning.views.facets import scale_of
from qkov_lightning.views.figures import differs_from_control, heatmap_figure, render, score_scale


def test_facets_have_widths_by_head_count_and_layer_0_on_top() -> None:
    figure = heatmap_figure(make_heatmap(), "math", "code")
    facets = figure.axes[:4]
    assert [axis.get_title() for axis in facets] == ["Q", "K", "V", "O"]
    widths = [axis.get_position().width for axis in facets]
    assert widths[0] == pytest.approx(2 * widths[1]) == pytest.approx(2 * widths[2])
    assert facets[0].get_ylim() == (2.5, -0.5)


def test_every_cell_has_the_colour_of_its_own_value() -> None:
    heatmap = make_heatmap()
    values = heatmap.values("math", "code", "relative")
    figure = heatmap_figure(heatmap, "math", "code", "relative")
    for block, axis in enumerate(figure.axes[:4]):
        shown = axis.images[0].get_array()
        heads = shown.shape[1]
        np.testing.assert_array_equal(shown.filled(np.nan), values[:, :heads, block])
    image = render(figure)
    axis = figure.axes[3]
    # A quarter off the centre: the mark is in the middle.
    x, y = axis.transData.transform((3 - 0.25, 2 - 0.25))
    expected = 255 * np.array(colormaps["magma"](float(values[2, 3, 3]) / 2))[:3]
    np.testing.assert_allclose(image[image.shape[0] - 1 - int(y), int(x)], expected, atol=2)


@pytest.mark.parametrize("score", ["relative", "cosine"])
def test_scale_of_a_score_with_a_natural_range_is_the_same_at_every_epoch(score: str) -> None:
    early, late = make_heatmap(seed=0), make_heatmap(seed=1, step=240)
    assert score_scale(early, score) == score_scale(late, score)
    limits = {axis.images[0].get_clim() for axis in heatmap_figure(early, "math", "code", score).axes[:4]}
    assert limits == {(-1.0, 1.0) if score == "cosine" else (0.0, 2.0)}


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
    figure = heatmap_figure(make_heatmap(), "math", "code")
    hatches = [
        {collection.get_hatch(): len(collection.get_paths()) for collection in axis.collections}
        for axis in figure.axes[:4]
    ]
    assert hatches[0].items() >= {"////": 1, "xxxx": 4}.items()
    assert hatches[1]["xxxx"] == 2
    assert "////" not in hatches[1]


def test_mark_is_on_cells_beyond_three_combined_standard_errors_of_the_control() -> None:
    heatmap = make_heatmap()
    a, b = 0, 1
    marked = differs_from_control(heatmap, "math", "code", "relative")
    for layer, head, block in np.ndindex(3, 4, 4):
        pair = float(heatmap.scores["relative"][a, b, layer, head, block])
        control = float(heatmap.scores["relative"][a, a, layer, head, block])
        assert bool(marked[layer, head, block]) == (abs(pair - control) > 3 * (0.05**2 + 0.05**2) ** 0.5)
    axis = heatmap_figure(heatmap, "math", "code", "relative").axes[3]
    dots = next(c for c in axis.collections if c.get_hatch() is None)
    shown = {(int(y), int(x)) for x, y in dots.get_offsets()}
    assert shown == {(int(y), int(x)) for y, x in marked[:, :, 3].nonzero()}
    assert 0 < len(shown) < 8


def test_title_says_pair_epoch_step_and_samples() -> None:
    texts = " ".join(text.get_text() for text in heatmap_figure(make_heatmap(), "math", "code").texts)
    for part in ("code pushes on math", "epoch 3", "step 120", "math 50, code 50"):
        assert part in texts


@pytest.mark.parametrize(("layers", "heads", "kv_heads"), [(28, 16, 8), (80, 64, 64)])
def test_labels_do_not_overlap_and_fit_in_the_picture(layers: int, heads: int, kv_heads: int) -> None:
    figure = heatmap_figure(make_heatmap(layers, heads, kv_heads), "math", "code", "relative")
    image = render(figure)
    assert max(image.shape) <= 3000
    for axis in figure.axes[:4]:
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
    assert axis.get_title() == "relative: code pushes on math"
    matplotlib.pyplot.close(figure)


def test_metric_plot_draws_on_the_axis_that_it_is_given_and_the_value_that_it_is_given() -> None:
    metric = _metric()
    figure = Figure()
    axis = figure.add_subplot()
    value = {name: 0 * values for name, values in metric.compute().items()}
    assert metric.plot(value, axis, score="cosine", pair=("code", "math")) == (figure, axis)
    assert axis.images[0].get_array()[0, 3] == 0
    assert axis.get_title() == "cosine: math pushes on code"


def test_metric_plot_refuses_an_unknown_score_or_task() -> None:
    with pytest.raises(
        ValueError,
        match="Unknown score 'heat'; there are interference, relative, cosine, conflict, forgetting, loss_rise",
    ):
        _metric().plot(score="heat")
    with pytest.raises(ValueError, match="Unknown task 'poetry'"):
        _metric().plot(pair=("math", "poetry"))
