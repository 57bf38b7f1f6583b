"""Files that appear whole or not at all. Knows nothing of what is in them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, sync it, rename it: a reader sees the old content or the new, never a
    part.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json_atomically(path: Path, value: Any) -> None:
    """`write_atomically` for a value that JSON can hold."""
    write_atomically(path, json.dumps(value, indent=1).encode())
