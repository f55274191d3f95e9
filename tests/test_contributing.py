"""CONTRIBUTING.md describes the package as it is, and its recipes work."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import make_heatmap
from torch import Tensor, nn
from torch.nn import functional

from qkov_lightning import (
    HeadInterference,
    Publication,
    find_projections,
    head_interference,
    register_logger,
    verify_projections,
)
from qkov_lightning.heads import conventions, placement
from qkov_lightning.scores import metric, scores
from qkov_lightning.views.loggers import send

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "qkov_lightning"
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"### (Add [\w ]+)\n.*?```python\n(.*?)```", GUIDE, flags=re.DOTALL))
DOORS = ("monitor", "stepping", "freezer", "projector", "cli_results", "cli_models", "cli")


def diagram_of(text: str) -> str:
    return re.search(r"```text\n(heads/.*?)```", text, flags=re.DOTALL)[1]  # type: ignore[index]


def listed(diagram: str) -> dict[str, list[str]]:
    """Files of each room, in the diagram's order."""
    rooms: dict[str, list[str]] = {}
    for line in diagram.splitlines():
        if not line.startswith(" "):
            room = line.split()[0].rstrip("/")
            rooms[room] = []
        else:
            rooms[room] += [name.strip() for name in line.split(",") if name.strip()]
    return rooms


def imports_of(path: Path) -> set[tuple[str, str]]:
    """The (room, file) of the package that a file imports when it is itself imported."""
    names = [
        node.module.split(".")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("qkov_lightning.")
    ]
    return {(name[1], name[2]) if len(name) > 2 else ("doors", name[1]) for name in names}


def test_the_diagram_lists_every_file() -> None:
    rooms = listed(diagram_of(GUIDE))
    assert rooms.pop("doors") == list(DOORS)
    for room, files in rooms.items():
        assert sorted(files) == sorted(p.stem for p in (PACKAGE / room).glob("*.py") if p.stem != "__init__")
    assert set(rooms) == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def test_every_file_imports_only_files_above_it() -> None:
    order = [(room, file) for room, files in listed(diagram_of(GUIDE)).items() for file in files]
    for position, (room, file) in enumerate(order):
        path = PACKAGE / (f"{file}.py" if room == "doors" else f"{room}/{file}.py")
        assert imports_of(path) <= set(order[:position]), path


def test_the_diagram_says_what_each_room_says_of_itself() -> None:
    for line in diagram_of(GUIDE).splitlines():
        room, _, sentence = line.partition(" ")
        if room.endswith("/"):
            own = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
            assert own is not None
            assert own.splitlines()[0] == sentence.strip()


def test_the_documentation_shows_the_same_diagram() -> None:
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    assert diagram_of(page) == diagram_of(GUIDE)


def test_every_file_that_it_names_exists() -> None:
    rooms = "|".join(listed(diagram_of(GUIDE)))
    named = re.findall(rf"`((?:tests/|{rooms})[\w/]*\.py|\w+\.py)`", GUIDE)
    assert len(named) > 10
    for name in named:
        assert (ROOT / name).exists() or (PACKAGE / name).exists(), name


def run(recipe: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(textwrap.dedent(RECIPES[recipe]), names)
    return names


def test_the_recipe_for_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    added = run("Add a score")["score"]
    assert metric.SCORES is scores.SCORES
    monkeypatch.setitem(scores.SCORES, added.name, added)
    gradients = torch.randn(6, 2, 5, dtype=torch.float64)
    tasks = ["a", "b", "a", "b", "b", "a"]
    fisher = gradients.square().mean(dim=0)
    result = head_interference(gradients, tasks, fisher)["a", "b"]
    norms = gradients[[1, 3, 4]].abs().sum(dim=-1)
    torch.testing.assert_close(result["push_norm"], norms.mean(dim=0))
    torch.testing.assert_close(result["push_norm_standard_error"], norms.std(dim=0) / 3**0.5)
    stateful = HeadInterference(["a", "b"], num_layers=1, num_heads=2)
    stateful.update(gradients, tasks, fisher, layer=0, block="Q")
    torch.testing.assert_close(stateful.compute()["push_norm"][0, 1, 0, :, 0], norms.mean(dim=0))


class ReversedAttention(nn.Module):
    """One projection whose rows are the values, then the keys, then the queries."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        value, key, query = (
            piece.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for piece in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


def test_the_recipe_for_a_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    row = run("Add an attention layout")["row"]
    monkeypatch.setattr(placement, "FUSED", (row, *conventions.FUSED))
    model = nn.Sequential(ReversedAttention())
    assert verify_projections(model, torch.randn(2, 5, 12), find_projections(model)).passed


def test_the_recipe_for_a_logger() -> None:
    pages: list[str] = []

    class WikiLogger:
        def upload(self, title: str, image: Any) -> None:
            pages.append(title)

    register_logger("WikiLogger", run("Add a logger")["send_to_wiki"])
    heatmap = make_heatmap()
    failed: set[int] = set()
    send([WikiLogger()], Publication.of(heatmap), failed)
    assert not failed
    assert pages[0] == "interference/_overview, epoch 3, step 120"
