"""Models of TransformerLens, whose weights are parameters or lie behind a bridge, work from end to end."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qkov_lightning import find_projections, verify_capture

pytest.importorskip("transformer_lens")

pytestmark = pytest.mark.filterwarnings("ignore")  # its own


def example() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "transformer_lens_model.py"
    spec = importlib.util.spec_from_file_location("transformer_lens_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["hooked", "bridged"])
def network(request: pytest.FixtureRequest) -> torch.nn.Module:
    if request.param == "hooked" and not example().has_hooked():
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    if request.param == "bridged" and not importlib.util.find_spec("transformer_lens.model_bridge"):
        pytest.skip("TransformerLens 2 has no bridge")
    return getattr(example(), request.param)()


def test_the_heads_are_found_and_their_gradients_are_those_of_autograd(network: torch.nn.Module) -> None:
    model = network.double().eval()
    tokens = torch.randint(0, 30, (2, 7))
    projections = find_projections(model, tokens)
    assert [p.block for p in projections] == [*"QKVO"] * 2
    assert all(torch.equal(p.head_features, torch.arange(32).view(4, 8)) for p in projections)
    verification = verify_capture(
        model, tokens, loss=lambda m, x: m(x).square().mean(), loss_reduction="mean", projections=projections
    )
    assert verification.passed, verification.summary


def test_a_training_is_monitored(network: torch.nn.Module, tmp_path: Path) -> None:
    monitor = example().main(str(tmp_path), network)
    assert monitor.heatmap is not None
    assert {layer.placed for layer in monitor.heatmap.layers} <= {"proven", "found and proven"}
    assert {info.status for layer in monitor.heatmap.layers for info in layer.blocks.values()} == {"measured"}
