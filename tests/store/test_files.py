"""Nothing half-written is left, whatever ends the writing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qkov_lightning.store.files import sweep, whole_file


@pytest.mark.parametrize("error", [OSError, RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def write() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half of the ne")
            raise error

    with pytest.raises(error):
        write()
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old"


def test_a_leftover_of_a_killed_process_is_written_over(tmp_path: Path) -> None:
    for end in ("killed", "well"):
        with whole_file(tmp_path / "a.json") as temporary:
            temporary.write_text(end)
            if end == "killed":
                leftover = temporary.read_bytes()
        if end == "killed":
            temporary.write_bytes(leftover)
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "well"


def test_what_killed_runs_left_half_written_is_swept_when_it_is_old(tmp_path: Path) -> None:
    run = tmp_path / "0a1b2c3d" / "fisher-0000000004"
    run.mkdir(parents=True)
    old, new, whole = (
        run / ".0000-Q.safetensors.tmp",
        run / ".0001-Q.safetensors.tmp",
        run / "0002-Q.safetensors",
    )
    for path in (old, new, whole):
        path.write_bytes(b"x")
    for path in (old, whole):
        os.utime(path, (0, 0))
    sweep(tmp_path)
    assert [path.exists() for path in (old, new, whole)] == [False, True, True]
