"""How the documentation is built: `make docs`, or `sphinx-build -W docs docs/_build`."""

import re
from html import escape

from docutils import nodes
from lightning.pytorch import Callback
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.textpath import TextPath
from sphinx.application import Sphinx
from sphinx.util.logging import getLogger
from sphinx.writers.html5 import HTML5Translator

from qkov_lightning.scores.scores import SCORES

logger = getLogger(__name__)

project = "qkov_lightning"
author = "the authors of qkov_lightning"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "qkov_lightning"
html_static_path = ["_static"]
html_css_files = ["docs.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
python_display_short_literal_types = True
napoleon_use_ivar = True
napoleon_use_rtype = False
# What the package does not say about itself, it inherits: the pages of torch and Lightning have it.
autodoc_inherit_docstrings = False
# Only the pytest plugin needs it, and only its docstring is shown.
autodoc_mock_imports = ["pytest"]


def skip_hooks(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Leave out the hooks of the callback, which nobody but Lightning calls."""
    owner = getattr(getattr(obj, "fget", obj), "__qualname__", "").partition(".")[0]
    return True if owner == "InterferenceMonitor" and hasattr(Callback, name) else None


def list_scores(app: Sphinx, document: str, source: list[str]) -> None:
    """Give every score of the package a section, with the formula of its docstring."""
    sections = (
        f"## {name}\n\n```{{eval-rst}}\n.. autofunction:: {score.function.__module__}.{score.function.__name__}\n   :no-index:\n```\n"
        for name, score in SCORES.items()
    )
    if document == "scores":
        source[0] = source[0].replace("{{SCORES}}", "\n".join(sections))


def hide_signature(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    signature: str | None,
    returned: str | None,
) -> tuple[str, None] | None:
    """A score is known by its formula: what its function takes and returns says nothing to a reader."""
    return ("", None) if obj in [score.function for score in SCORES.values()] else None


def svg(formula: str) -> str:
    """A formula as a picture in the text's own size and colour: the pages load no script and no font."""
    outline = TextPath((0, 0), f"${formula}$", size=100, prop=FontProperties(math_fontfamily="stix"))
    commands = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C", Path.CLOSEPOLY: "Z"}
    parts = []
    for points, code in outline.iter_segments(curves=True, simplify=False):
        # Pictures count downwards.
        numbers = [f"{-value if i % 2 else value:.0f}" for i, value in enumerate(points)]
        parts.append(commands[code] + ("" if code == Path.CLOSEPOLY else " ".join(numbers)))
    box = outline.get_extents().padded(3)
    return (
        f'<svg role="img" aria-label="{escape(formula)}" viewBox="{box.x0:.0f} {-box.y1:.0f} {box.width:.0f} {box.height:.0f}" '
        f'style="width: {box.width / 100:.2f}em; vertical-align: {box.y0 / 100:.2f}em">'
        f'<path fill="currentColor" d="{"".join(parts)}"/></svg>'
    )


def visit_math(writer: HTML5Translator, node: nodes.Element) -> None:
    """Formulas without MathJax, which would come from a network."""
    formula = " ".join(node.astext().split())
    # Matplotlib sizes delimiters by itself, and does not know all of their names.
    formula = re.sub(r"\\[bB]igg?[lrm]?(?![A-Za-z])", "", formula)
    formula = re.sub(r"\\[lr]Vert", r"\\|", re.sub(r"\\[lr]vert", "|", formula))
    block = isinstance(node, nodes.math_block)
    if block:
        formula = re.sub(r"(\\sum_(?:\{[^}]*\}|\w))", r"\1\\,", formula.replace(r"\frac", r"\dfrac"))
    try:
        drawn = svg(formula)
    except ValueError as error:
        logger.warning("Matplotlib cannot draw the formula %s: %s", formula, error, location=node)
        drawn = f"<code>{escape(formula)}</code>"
    writer.body.append(f'<p class="formula">{drawn}</p>\n' if block else drawn)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Register what is above."""
    app.connect("source-read", list_scores)
    app.connect("autodoc-skip-member", skip_hooks)
    app.connect("autodoc-process-signature", hide_signature)
    app.add_html_math_renderer("svg", (visit_math, None), (visit_math, None))


html_math_renderer = "svg"
