"""What stands for an adapter's weights: a hash of its files, by a manifest or read anew. Knows files only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from art_engine_kit.adapter_bin import ADAPTER_BIN
from art_engine_kit.checkpoint_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, FileRecord, file_record

_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_BIN)


def fingerprint(files: Mapping[str, FileRecord]) -> str:
    """The fingerprint by a manifest's `files`, whatever else they hold."""
    lines = [f"{name} {files[name].sha256}" for name in _FILES if name in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def fingerprint_of(folder: Path) -> str:
    """The fingerprint of the adapter in a folder, which is read whole: call it off the event loop."""
    return fingerprint({name: file_record(folder / name) for name in _FILES if (folder / name).exists()})
