"""Every example runs."""

import ast
import json
import warnings
from pathlib import Path

import pytest

from qkov_lightning import InterferenceHeatmap, cli

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_demo_leaves_a_heatmap_of_its_three_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import demo

    whole = demo.Trainer

    def short(**options: object) -> object:
        return whole(**{**options, "max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 1})

    monkeypatch.setattr(demo, "Trainer", short)
    monkeypatch.setattr(demo, "InterferenceMonitor", lambda **options: _monitor())
    demo.main()
    (latest,) = tmp_path.rglob("latest.json")
    assert json.loads(latest.read_text())["tasks"] == ["code", "math", "prose"]
    assert "tensorboard --logdir" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("inspect", "demo:ByteLanguageModel", "--verify"), "64 of 64 cells proven"),
        (
            ("verify", "--model", "demo.ByteLanguageModel", "--data", "byte_model.TextTasks"),
            "64 of 64 cells agree",
        ),
    ],
)
def test_commands_work_with_the_model_of_the_demo(
    arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["qkov", *arguments])
    cli.main()
    assert said in " ".join(capsys.readouterr().out.split())


def _monitor() -> object:
    from qkov_lightning import InterferenceMonitor

    return InterferenceMonitor(every_n_steps=1)


def test_notebook_was_executed_and_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """In order, from the top; what the last line of a cell gives is what the notebook shows."""
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        for cell in cells:
            assert cell["execution_count"] is not None
            tree = ast.parse(
                "".join(cell["source"]).replace("limit_train_batches=120", "limit_train_batches=6")
            )
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) and cell["outputs"] else None
            exec(compile(tree, "notebook", "exec"), names)
            if last is None or any("text" in output for output in cell["outputs"]):
                continue
            value = eval(compile(ast.Expression(last.value), "notebook", "eval"), names)  # type: ignore[attr-defined]
            shown = cell["outputs"][0]["data"]
            for kind, method in (("text/html", "_repr_html_"), ("image/png", "_repr_png_")):
                made = getattr(value, method, lambda: None)()
                assert (kind in shown) == (made is not None)
    assert names["heatmap"].tasks == ("code", "math", "prose")  # type: ignore[attr-defined]


def test_plain_loop_scores_every_pair_without_a_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    import plain_loop

    plain_loop.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all("nan" not in line for line in lines)


# Peft asks transformers under a name that transformers has given up.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_finetuning_of_a_local_checkpoint_compares_prose_and_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import finetune_lora

    checkpoint = tmp_path / "checkpoint"
    _save_tiny_language_model(checkpoint, [*finetune_lora.prose().values()][:20])
    finetune_lora.main(str(checkpoint), samples_per_task=60, max_length=32, max_epochs=1, precision="32-true")
    (latest,) = tmp_path.rglob("latest.json")
    heatmap = InterferenceHeatmap.load(latest)
    # 108 training samples in batches of 4, of which every tenth is captured.
    assert sum(heatmap.samples_per_task.values()) == 3 * 4
    assert {info.status for layer in heatmap.layers for info in layer.blocks.values()} == {"measured"}
    assert [layer.blocks["K"].num_heads for layer in heatmap.layers] == [2, 2]
    pair = heatmap.pairs[0]
    names = finetune_lora.prose().keys() | finetune_lora.code().keys()
    assert {pair.sample_a.split("@")[0], pair.sample_b.split("@")[0]} <= names
    assert "<- code" in capsys.readouterr().out


def _save_tiny_language_model(folder: Path, texts: list[str]) -> None:
    """A randomly initialised Qwen3 with a tokenizer of its own, as from_pretrained expects them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=None, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def test_vision_transformer_compares_two_label_sets_of_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import vision_two_label_sets

    samples = vision_two_label_sets.samples()
    assert [sample["task"] for sample in samples[:2]] == ["digit", "parity"]
    assert all(
        sample["label"] == samples[i - i % 2]["label"] % (10, 2)[i % 2] for i, sample in enumerate(samples)
    )
    monkeypatch.setattr(vision_two_label_sets, "samples", lambda: samples[:1000])
    vision_two_label_sets.main(max_epochs=1)
    (latest,) = tmp_path.rglob("latest.json")
    heatmap = InterferenceHeatmap.load(latest)
    assert heatmap.tasks == ("digit", "parity")
    assert bool((heatmap.num_samples >= 2).all())
    printed = capsys.readouterr().out
    assert "Validation accuracy 0." in printed
    assert "<- parity" in printed
