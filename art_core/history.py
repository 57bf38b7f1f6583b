"""The history of a model's metrics as a file: one JSON object a line, appended and never rewritten.

Knows the form of a line and how to survive a writer that was killed in the middle of one. Computes nothing.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HISTORY = "history.jsonl"


def append_history(path: Path, metrics: Mapping[str, float], *, step: int, split: str) -> None:
    """Append one line: `step`, `split`, `recorded_at` and the metrics under their full names.

    JSON has no NaN and no infinity: such a metric is null, and its value stands in `non_finite`. When the line can't be
    written whole the file is left as it was and an OSError is raised that holds the metrics.
    """
    strange = {name: str(value) for name, value in metrics.items() if not math.isfinite(value)}
    record: dict[str, Any] = {"step": step, "split": split, "recorded_at": datetime.now(UTC).isoformat()}
    record |= {name: None if name in strange else value for name, value in metrics.items()}
    if strange:
        record["non_finite"] = strange
    line = json.dumps(record).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _append(path, line)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror or error}; the metrics of step {step} are not in the history, which is as it was before."
            f" They were: {line.decode().rstrip()}",
            str(path),
        ) from error


def read_history(path: Path | str) -> list[dict[str, Any]]:
    """The records of a history file, oldest first; an absent file has none.

    A line that a killed writer left unfinished is skipped, with a warning unless it is the last.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            record.update({name: float(value) for name, value in record.pop("non_finite", {}).items()})
        except (ValueError, AttributeError):
            if number < len(lines):
                warnings.warn(f"line {number} of {path} is not whole and is skipped", RuntimeWarning, stacklevel=2)
            continue
        records.append(record)
    return records


def _append(path: Path, line: bytes) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        content = b"\n" + line if torn else line
        try:
            if os.write(descriptor, content) < len(content):
                raise OSError(28, "No space left on device")
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)
