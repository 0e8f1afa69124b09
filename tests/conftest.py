"""Tests run from anywhere, import from the repository's root, and never reach for a network."""

import os
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def mini_model(tmp_path_factory):
    """A random miniature with its tokenizer: (directory, examples)."""
    from mini import world

    examples = world.fables(200, seed=0)
    path = tmp_path_factory.mktemp("mini") / "start"
    world.make_model(path, examples, seed=0, hidden=32)
    return path, examples
