"""A heatmap in a notebook: the answer in words, and the overview as a picture."""

from __future__ import annotations

import base64
import html

from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.measure.names import printable
from qkov_lightning.views.answer import answer
from qkov_lightning.views.overview import overview
from qkov_lightning.views.page import DPI, render, to_png


def to_html(heatmap: InterferenceHeatmap) -> str:
    """HTML that needs nothing else: the answer, and the overview inside."""
    first, *others = (html.escape(printable(line)) for line in answer(heatmap))
    image = render(overview(heatmap))
    data = base64.b64encode(to_png(image)).decode()
    lines = "".join(f"<li>{line}</li>" for line in others)
    width = image.shape[1] * 96 // DPI
    return (
        f"<p><b>{first}</b> ({heatmap.when})</p><ul>{lines}</ul>"
        f'<img alt="{first}" style="max-width:100%" width="{width}" src="data:image/png;base64,{data}">'
    )
