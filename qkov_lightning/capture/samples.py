"""Which task a sample belongs to, and how to find the sample again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor

from qkov_lightning.capture.batches import batch_size, fingerprints

MAX_TEXT = 120
"""Characters of a sample's text that are kept; line breaks become blanks."""


@dataclass(frozen=True)
class Samples:
    """The samples of one forward pass, in batch order.

    Attributes:
        tasks: Task of each sample.
        ids: Identifier of each sample.
        num_target_tokens: Tokens that each sample adds to a token-mean loss, if that is known.
        groups: Group of each sample (its document, its user), if samples of one group are not independent.
        texts: The beginning of each sample's text, where texts are kept.
    """

    tasks: tuple[str, ...]
    ids: tuple[str, ...]
    num_target_tokens: tuple[int, ...] | None = None
    groups: tuple[str, ...] | None = None
    texts: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.tasks)


@dataclass(frozen=True, eq=False)
class Labels:
    """What is known about the samples of a forward pass before their number is.

    Attributes:
        tasks: One task for all samples, or one for each.
        ids: Identifier of each sample; without them a fingerprint of what the batch holds of it, or else
            running numbers per task.
        num_target_tokens: Tokens that each sample adds to a token-mean loss.
        token_samples: Sample of every token of the model's input, -1 for none; where samples are not
            simply the rows of the batch.
        batch: The batch, which tells samples apart that have no identifier.
        groups: Group of each sample.
        numbered: Whether samples without an identifier are numbered, whatever the batch holds of them.
        texts: Text of each sample, of which the beginning is kept.
    """

    tasks: str | tuple[str, ...]
    ids: tuple[str, ...] | None = None
    num_target_tokens: tuple[int, ...] | None = None
    token_samples: Tensor | None = None
    batch: object = None
    groups: tuple[str, ...] | None = None
    numbered: bool = False
    texts: tuple[str, ...] | None = None

    @property
    def key(self) -> tuple[object, object]:
        """The same for labels that say the same."""
        return self.tasks, self.ids

    @property
    def num_samples(self) -> int | None:
        """Number of samples, where the labels or the batch settle it."""
        if not isinstance(self.tasks, str):
            return len(self.tasks)
        if self.ids is not None:
            return len(self.ids)
        if self.token_samples is not None:
            return int(self.token_samples.max()) + 1
        return batch_size(self.batch)

    def resolve(
        self, num_samples: int, numbering: Counter[str], rank: int = 0, world_size: int = 1
    ) -> Samples:
        """The samples of a forward pass over ``num_samples`` inputs.

        Args:
            num_samples: First dimension of the model's activations.
            numbering: Samples seen so far per task; counts on where there are no identifiers.
            rank: This process; processes number their samples alternately.
            world_size: Number of processes.

        Returns:
            One task and one identifier per sample.

        Raises:
            ValueError: If there are not exactly ``num_samples`` labels of each kind.
        """
        tasks = (self.tasks,) * num_samples if isinstance(self.tasks, str) else self.tasks
        for what, values in (
            ("tasks", tasks),
            ("sample ids", self.ids),
            ("target token counts", self.num_target_tokens),
            ("groups", self.groups),
            ("texts", self.texts),
        ):
            if values is not None and len(values) != num_samples:
                raise ValueError(
                    f"{len(values)} {what} for a batch of {num_samples} samples, expected one per sample"
                    + (", or one value for the whole batch." if what == "tasks" else ".")
                )
        ids = self.ids
        if ids is None and self.batch is not None and not self.numbered:
            ids = fingerprints(self.batch, num_samples, self.token_samples)
        if ids is None:
            numbered = []
            for name in tasks:
                numbered.append(f"#{numbering[name] * world_size + rank}")
                numbering[name] += 1
            ids = tuple(numbered)
        return Samples(tasks, ids, self.num_target_tokens, self.groups, self.texts)


_current: ContextVar[Labels | None] = ContextVar("qkov_task", default=None)


@contextmanager
def task(
    tasks: object,
    *,
    sample_ids: object = None,
    num_target_tokens: object = None,
    token_samples: Tensor | None = None,
    groups: object = None,
) -> Iterator[None]:
    """Say which task the samples of a forward pass belong to, where the batch cannot say it.

    For modules that run one forward per task, and for training loops without a Trainer::

        def training_step(self, batch, batch_idx):
            with task("math"):
                loss = self.loss(batch["math"])
            with task("code"):
                loss = loss + self.loss(batch["code"])
            return loss

    Args:
        tasks: One task (string or int) for all samples of the forward, or one per sample.
        sample_ids: Identifiers, one per sample; running numbers per task without them.
        num_target_tokens: Target tokens of each sample, for ``loss_reduction="token_mean"``.
        token_samples: For packed sequences and flattened inputs: the sample (counted from 0) of every token
            of the input, -1 for padding, as from :func:`samples_from_positions`.
        groups: Group of each sample (its document, its user), where samples of one group are not independent.

    Raises:
        ValueError: If a task is neither a string nor an int, or a token belongs to no listed sample.
    """
    token = _current.set(label_samples(tasks, sample_ids, num_target_tokens, token_samples, groups=groups))
    try:
        yield
    finally:
        _current.reset(token)


def current_labels() -> Labels | None:
    """Labels given by the ``with task(...)`` that surrounds the caller, if one does."""
    return _current.get()


def samples_from_positions(position_ids: Int[Tensor, "*batch token"]) -> Int[Tensor, "*batch token"]:
    """Sample of every token of packed sequences, from positions that start again at 0 with each sample.

    >>> import torch
    >>> samples_from_positions(torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]))
    tensor([[0, 0, 0, 1, 1],
            [2, 3, 3, 3, 3]])
    """
    starts = position_ids == 0
    starts[..., 0] = True
    return starts.flatten().cumsum(0).view(position_ids.shape) - 1


def label_samples(
    tasks: object,
    sample_ids: object = None,
    num_target_tokens: object = None,
    token_samples: Tensor | None = None,
    batch: object = None,
    groups: object = None,
    texts: object = None,
) -> Labels:
    """Labels from strings, ints, sequences or tensors of them.

    Raises:
        ValueError: If a task is neither a string nor an int, or a token belongs to no listed sample.
    """
    listed = _as_list(tasks)
    names = _task_name(listed) if not isinstance(listed, list) else tuple(_task_name(name) for name in listed)
    if token_samples is not None and not isinstance(names, str) and int(token_samples.max()) >= len(names):
        raise ValueError(
            f"A token belongs to sample {int(token_samples.max())}, but there are {len(names)} tasks: expected one "
            "task per packed sample, in the order of the samples."
        )
    return Labels(
        tasks=names,
        ids=None if sample_ids is None else tuple(str(value) for value in _as_sequence(sample_ids)),
        num_target_tokens=None
        if num_target_tokens is None
        else tuple(int(value) for value in _as_sequence(num_target_tokens)),
        token_samples=token_samples,
        batch=batch,
        groups=None if groups is None else tuple(str(value) for value in _as_sequence(groups)),
        texts=None
        if texts is None
        else tuple(" ".join(str(value).split())[:MAX_TEXT] for value in _as_sequence(texts)),
    )


def read_labels(
    batch: object,
    task_of: str | Callable[[Any], Any],
    sample_id_of: str | Callable[[Any], Any],
    num_target_tokens_of: str | Callable[[Any], Any],
    token_samples_of: str | Callable[[Any], Any] = "token_samples",
    group_of: str | Callable[[Any], Any] = "group",
    sample_text_of: str | Callable[[Any], Any] | None = None,
) -> Labels:
    """Labels of a batch, each from a batch key (or attribute) or from a function of the batch.

    Raises:
        ValueError: If the batch does not say which task its samples belong to.
    """
    tasks = _entry(batch, task_of)
    if tasks is None:
        found = sorted(map(str, batch)) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise ValueError(
            f"The batch does not say which task its samples belong to: expected `batch[{task_of!r}]`, found {found}. "
            "Add that entry to the batch (strings or ints, one per sample or one for all), pass "
            "`task_of=<key or function of the batch>`, or wrap each forward pass in `with qkov_lightning.task(...)`."
        )
    token_samples = _entry(batch, token_samples_of)
    if token_samples is not None and not isinstance(token_samples, Tensor):
        raise ValueError(f"token_samples is a {type(token_samples).__name__}, expected a tensor of ints.")
    return label_samples(
        tasks,
        _entry(batch, sample_id_of),
        _entry(batch, num_target_tokens_of),
        token_samples,
        batch,
        _entry(batch, group_of),
        None if sample_text_of is None else _texts(batch, sample_text_of),
    )


def _texts(batch: object, source: str | Callable[[Any], Any]) -> object:
    """Texts of the samples.

    Raises:
        ValueError: If the batch has none.
    """
    found = _entry(batch, source)
    if found is None or (isinstance(found, Tensor) and not callable(source)):
        raise ValueError(
            f"sample_text_of is {source!r}, where the batch has {'no entry' if found is None else 'a tensor'}: expected "
            "strings, one per sample. Pass the key of texts, or a function of the batch that decodes its tokens."
        )
    return found


def tasks_at_hand(batch: object, task_of: str | Callable[[Any], Any]) -> frozenset[str]:
    """Tasks of a batch that is not captured, where it costs nothing to look.

    No function to call, no device to wait for.
    """
    found = None if callable(task_of) else _entry(batch, task_of)
    if found is None or (isinstance(found, Tensor) and found.device.type != "cpu"):
        return frozenset()
    listed = _as_list(found)
    return frozenset(str(name) for name in (listed if isinstance(listed, list) else [listed]))


def _entry(batch: object, source: str | Callable[[Any], Any]) -> object:
    if callable(source):
        return source(batch)
    if isinstance(batch, Mapping):
        return batch.get(source)
    return getattr(batch, source, None)


def _as_list(values: object) -> object:
    if isinstance(values, Tensor) or hasattr(values, "tolist"):  # numpy arrays too
        return values.tolist()
    if isinstance(values, Sequence) and not isinstance(values, str):
        return [_as_list(value) for value in values]
    return values


def _as_sequence(values: object) -> Sequence[Any]:
    listed = _as_list(values)
    return listed if isinstance(listed, list) else [listed]


def _task_name(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"A task is {value!r} ({type(value).__name__}), expected a string or an int.")
