"""A heatmap as a Plotly figure: the same facets, with the numbers under the pointer."""

from __future__ import annotations

import math
from typing import Any

from matplotlib import colormaps

from qkov_lightning.heads.projections import BLOCKS
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.measure.names import pair_label, printable
from qkov_lightning.views.facets import Scale
from qkov_lightning.views.figures import marks_legend, missing_cells, num_heads_of, score_scale
from qkov_lightning.views.marks import marks_of

SIGNS = {1.0: "●", -1.0: "○", 0.0: ""}
"""Marks of a cell."""

SYMBOLS = {"no data": "line-ne-open", "frozen": "x-thin-open"}
"""Marker of a cell without a value, by reason."""


def require_plotly() -> Any:
    """Plotly, which is optional.

    Returns:
        The modules ``plotly.graph_objects`` and ``plotly.subplots``.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    try:
        from plotly import graph_objects, subplots
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Interactive heatmaps need plotly, which is not installed. Fix: pip install 'plotly>=6'."
        ) from error
    return graph_objects, subplots


def colour_steps(scale: Scale) -> list[list[Any]]:
    """The colour map of a scale in Plotly's form."""
    shares = [index / 16 for index in range(17)]
    colours = [[round(255 * part) for part in colormaps[scale.colormap](share)[:3]] for share in shares]
    return [[share, f"rgb({r},{g},{b})"] for share, (r, g, b) in zip(shares, colours, strict=True)]


def facet_data(heatmap: InterferenceHeatmap, a: str, b: str, score: str) -> list[dict[str, Any]]:
    """What each block shows, in builtins.

    Args:
        heatmap: The result.
        a: Task that is hurt.
        b: Task that pushes.
        score: Which score.

    Returns:
        Per block: ``z`` and ``error`` as rows of layers with None for missing, ``text`` with the marks, and
        ``missing`` as ``x``, ``y`` and ``reason`` lists.

    Raises:
        ValueError: If the heatmap does not know the task or the score.
    """
    values, errors = heatmap.values(a, b, score), heatmap.errors(a, b, score)
    marks = marks_of(heatmap, a, b, score)
    result = []
    for block, heads in enumerate(num_heads_of(heatmap)):
        cells = values[:, :heads, block]
        missing: dict[str, list[Any]] = {"x": [], "y": [], "reason": []}
        for reason, where in missing_cells(heatmap, block, cells.numpy()).items():
            for layer, head in zip(*where.nonzero(), strict=True):
                missing["x"].append(int(head))
                missing["y"].append(int(layer))
                missing["reason"].append(reason)
        result.append({
            "z": [[_number(value) for value in row] for row in cells.tolist()],
            "error": [[_number(value) for value in row] for row in errors[:, :heads, block].tolist()],
            "text": [[SIGNS[mark] for mark in row] for row in marks[:, :heads, block].tolist()],
            "missing": missing,
        })
    return result


def interactive_heatmap(heatmap: InterferenceHeatmap, a: str, b: str) -> Any:
    """All scores of one task pair, chosen by a menu.

    Args:
        heatmap: The result to draw.
        a: Task that is hurt.
        b: Task that pushes.

    Returns:
        A ``plotly.graph_objects.Figure``.

    Raises:
        ModuleNotFoundError: If plotly is not installed.
        ValueError: If the heatmap does not know the task.
    """
    graph, subplots = require_plotly()
    heads = num_heads_of(heatmap)
    figure = subplots.make_subplots(
        1, 4, shared_yaxes=True, column_widths=heads, horizontal_spacing=0.02, subplot_titles=BLOCKS
    )
    views = {score: facet_data(heatmap, a, b, score) for score in heatmap.shown_scores}
    first = next(iter(views))
    for column, facet in enumerate(views[first], start=1):
        figure.add_trace(
            graph.Heatmap(
                z=facet["z"], customdata=facet["error"], text=facet["text"], texttemplate="%{text}", textfont={"size": 9},
                coloraxis="coloraxis", name=BLOCKS[column - 1], hoverongaps=False, xgap=0.5, ygap=0.5,
                hovertemplate=f"L%{{y}}.H%{{x}}.{BLOCKS[column - 1]}<br>%{{z:.4g}} ± %{{customdata:.2g}}<extra></extra>",
            ), 1, column,
        )  # fmt: skip
        missing = facet["missing"]
        figure.add_trace(
            graph.Scatter(
                x=missing["x"], y=missing["y"], text=missing["reason"], mode="markers", showlegend=False,
                marker={"symbol": [SYMBOLS[reason] for reason in missing["reason"]], "color": "#888", "size": 8},
                hovertemplate=f"L%{{y}}.H%{{x}}.{BLOCKS[column - 1]}<br>%{{text}}<extra></extra>",
            ), 1, column,
        )  # fmt: skip
        figure.update_xaxes(
            title_text="head", range=[-0.5, heads[column - 1] - 0.5], showgrid=False, zeroline=False,
            tickmode="linear", dtick=max(1, heads[column - 1] // 8), row=1, col=column,
        )  # fmt: skip
    figure.update_yaxes(
        range=[heatmap.num_layers - 0.5, -0.5], showgrid=False, zeroline=False, tickmode="linear",
        dtick=max(1, heatmap.num_layers // 14),
    )  # fmt: skip
    figure.update_yaxes(title_text="layer", row=1, col=1)
    buttons = [
        {
            "label": score,
            "method": "update",
            "args": [
                {"z": [f["z"] for f in view], "customdata": [f["error"] for f in view], "text": [f["text"] for f in view]},
                {"coloraxis": colour_axis(score_scale(heatmap, score))},
                [0, 2, 4, 6],
            ],
        }
        for score, view in views.items()
    ]  # fmt: skip
    figure.update_layout(
        title={"text": f"{plain(pair_label(a, b))}<br><sub>{heatmap.when} · "
               f"{plain(marks_legend(first).partition('    //')[0])}</sub>"},
        coloraxis=colour_axis(score_scale(heatmap, first)),
        plot_bgcolor="white",
        height=max(380, min(1400, 180 + 22 * heatmap.num_layers)),
        margin={"t": 110, "r": 30, "l": 60, "b": 55},
        updatemenus=[{"buttons": buttons, "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "pad": {"b": 28}}],
    )  # fmt: skip
    return figure


def colour_axis(scale: Scale) -> dict[str, Any]:
    """A scale as Plotly's colour axis."""
    return {
        "cmin": scale.low,
        "cmax": scale.high,
        "colorscale": colour_steps(scale),
        "colorbar": {"thickness": 12},
    }


def plain(name: str) -> str:
    """A task name that Plotly does not take for markup."""
    return printable(name).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _number(value: float) -> float | None:
    """Four significant digits, None for what is not a finite number."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
