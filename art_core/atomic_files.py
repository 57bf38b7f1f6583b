"""Files that appear whole or not at all. Knows nothing of what is in them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4


@contextmanager
def appearing(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write, under a temporary name until the block is left; then it is synced and renamed.

    A reader sees the old content or the new, never a part. Nothing is left of a block that raises.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file; see `appearing`."""
    with appearing(path) as file:
        file.write(content)


def write_json_atomically(path: Path, value: Any) -> None:
    """`write_atomically` for a value that JSON can hold."""
    write_atomically(path, json.dumps(value, indent=1).encode())
