"""Shapes and types of the package are checked at run time in every test."""

import os

os.environ.setdefault("MPLBACKEND", "agg")
# Tests run side by side: more threads than processors would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

# Before anything imports the package, or the checking starts too late.
install_import_hook("qkov_lightning", "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
