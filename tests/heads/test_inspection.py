"""What a user sees of the head map before training."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoConfig, AutoModel

from qkov_lightning import describe
from qkov_lightning.cli import main
from qkov_lightning.heads.finding import find_projections
from qkov_lightning.heads.inspection import (
    cache_bytes_per_sample,
    covered_parameters,
    load_model,
    random_batch,
)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def llama() -> nn.Module:
    return AutoModel.from_config(AutoConfig.for_model("llama", **SIZES, num_key_value_heads=2, vocab_size=64))


def swapped() -> nn.Module:
    """A model whose config lies about the size of its heads."""
    model = llama()
    for layer in model.layers:
        layer.self_attn.num_heads, layer.self_attn.num_key_value_heads = 8, 4
        layer.self_attn.head_dim = 4
        layer.self_attn.forward = _other_heads(layer.self_attn)
    return model


def _other_heads(attention: nn.Module):  # noqa: ANN202
    forward = type(attention).forward

    def run(*args: object, **kwargs: object) -> object:
        attention.head_dim = 8
        try:
            return forward(attention, *args, **kwargs)
        finally:
            attention.head_dim = 4

    return run


def text_of(model: nn.Module, num_tokens: int = 512) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(describe(model, num_tokens))
    return console.file.getvalue()


def test_the_table_tells_heads_sizes_modules_features_and_what_is_frozen() -> None:
    model = llama()
    model.layers[0].self_attn.v_proj.requires_grad_(False)
    text = text_of(model)
    (key,) = [line for line in text.splitlines() if "layers.0.self_attn.k_proj" in line]
    assert "2 (each for 2 query heads)" in key
    assert "output 0-7, 8-15" in key
    assert "trained" in key
    (value,) = [line for line in text.splitlines() if "layers.0.self_attn.v_proj" in line]
    assert "frozen" in value
    assert "input 0-7, 8-15, 16-23, ..." in text
    assert "L1 layers.1.self_attn" in text


def test_what_all_heads_share_is_said_to_be_shared() -> None:
    config = AutoConfig.for_model(
        "deepseek_v3", **SIZES, num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=6, first_k_dense_replace=2, vocab_size=64,
    )  # fmt: skip
    text = text_of(AutoModel.from_config(config))
    assert "layers.0.self_attn.q_a_proj, layers.0.self_attn.kv_a_proj_with_mqa" in text
    assert "no slice per head" in text
    assert "output 0-7, 14-21, 28-35, ..." in text


def test_the_feed_forward_beside_a_packed_attention_is_none_of_its_parts() -> None:
    text = text_of(nn.TransformerEncoderLayer(32, 4, 48))
    assert "self_attn.out_proj" in text
    assert "linear1" not in text
    assert "takes about 16.0 KiB in the cache" in text


def test_parameters_covered_are_the_weights_of_the_projections() -> None:
    model = llama()
    weights = [p for name, p in model.named_parameters() if "self_attn" in name]
    assert covered_parameters(model, find_projections(model)) == sum(w.numel() for w in weights)
    packed = nn.MultiheadAttention(32, 4)
    assert covered_parameters(packed, find_projections(packed)) == 4 * 32 * 32


def test_cache_estimate_counts_a_shared_input_once_and_stops_at_the_size_of_the_gradients() -> None:
    model = llama()
    per_layer = 3 * (32 + 32 + 16 + 16) + 3 * (32 + 32)
    assert cache_bytes_per_sample(model, 3) == 2 * 4 * per_layer
    assert cache_bytes_per_sample(model, 10_000) == 2 * 4 * (32 * 64 + 32 * 32)
    assert cache_bytes_per_sample(model.requires_grad_(False), 3) == 0


def test_a_model_comes_from_an_import_path_or_a_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_here.py").write_text(
        "import torch\ndef model():\n    return torch.nn.MultiheadAttention(8, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert isinstance(load_model("made_here:model"), nn.MultiheadAttention)
    llama().save_pretrained(tmp_path / "saved")
    assert type(load_model(str(tmp_path / "saved"))).__name__ == "LlamaModel"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "is no folder and no import path: expected a local `from_pretrained` folder"),
        ("no_such_module:model", "cannot be imported: No module named 'no_such_module'"),
        ("math:no_such_function", "cannot be imported: module 'math' has no attribute"),
        ("time:time", "returned a float, expected a torch.nn.Module"),
    ],
)
def test_sources_that_give_no_model_are_refused(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(source)


def vit() -> nn.Module:
    return AutoModel.from_config(AutoConfig.for_model("vit", **SIZES, image_size=8, patch_size=4))


def test_models_that_take_neither_tokens_nor_images_are_sent_to_python() -> None:
    with pytest.raises(ValueError, match=r"verify_projections\(model, batch\)"):
        random_batch(nn.MultiheadAttention(8, 2))
    assert random_batch(llama())["input_ids"].shape == torch.Size([2, 8])
    assert random_batch(vit())["pixel_values"].shape == torch.Size([2, 3, 8, 8])
    video = vit()
    video.config.num_frames = 5
    assert random_batch(video)["pixel_values"].shape == torch.Size([2, 5, 3, 8, 8])


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["qkov", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    main()


@pytest.mark.parametrize(
    ("make", "layer", "proven"),
    [("llama", "layers.1.self_attn", "24 of 24"), ("vit", "layers.1.attention", "32 of 32")],
)
def test_inspect_prints_the_map_and_the_proof(
    make: str, layer: str, proven: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "inspect", f"{__name__}:{make}", "--verify", "true")
    printed = capsys.readouterr().out
    assert layer in printed
    assert f"{proven} cells proven" in printed


def test_inspect_fails_where_the_map_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "inspect", f"{__name__}:swapped", "--verify", "true")
    assert "of 48 cells proven" in capsys.readouterr().err


def test_the_command_finds_heads_without_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    run(monkeypatch, "inspect", "test_inspection:llama", "--discover", "--verify")
    printed = capsys.readouterr().out
    assert "layers.1.self_attn" in printed
    assert "24 of 24 cells proven" in printed
