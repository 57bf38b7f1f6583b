"""Makes of what a library says of a file that could not be written the OSError that it was: a full disk, a limit, no
permission. Knows the libraries' exceptions and nothing of what is written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def as_os_error(file: Path) -> Iterator[None]:
    """Around the writing of `file`: safetensors' error that holds one of the system's number is raised as OSError."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(file)) from error
