"""What the tests of art-wandb share."""

import sys
from importlib import import_module
from pathlib import Path

import pytest

# Beside this file, and no package's.
sys.path.insert(0, str(Path(__file__).parent))
wandb_files = import_module("wandb_files")


@pytest.fixture(scope="session")
def run_files():
    """How the files of runs are read."""
    return wandb_files
