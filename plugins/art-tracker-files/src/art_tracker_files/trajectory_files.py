"""Parquet files of trajectories: where they are, how groups are added to one, and how they are read back.

A file is written under a temporary name and renamed, so a reader finds the old content or the new. Knows no schema.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from art_core import TrajectoryGroup, check_name

from .rows import SCHEMA, groups_of, rows_of


def trajectories_path(folder: Path, split: str, step: int) -> Path:
    """`trajectories/train/0042.parquet` under a model's folder."""
    return folder / "trajectories" / check_name(split, what="split") / f"{step:04d}.parquet"


def add_trajectories(path: Path, groups: Sequence[TrajectoryGroup]) -> None:
    """Add groups after those that the file holds already. Raises OSError; the file is then as it was before.

    A file that cannot be read is kept under another name, with a warning. A trajectory that can't be written is named
    in a warning and left out.
    """
    table = None
    if path.exists():
        try:
            table = _read_table(path)
        except ValueError as error:
            aside = path.with_name(f"{path.name}.unreadable-{uuid4().hex[:8]}")
            path.rename(aside)
            warnings.warn(f"{error} It is kept as {aside.name}.", RuntimeWarning, stacklevel=2)
    first = 0 if table is None or not table.num_rows else max(table["group_index"].to_pylist()) + 1
    rows, problems = rows_of(groups, first)
    added = pa.Table.from_pylist(rows, schema=SCHEMA)
    _write(path, added if table is None else pa.concat_tables([table, added]))
    for problem in problems:
        warnings.warn(f"{problem} It is left out of {path}.", RuntimeWarning, stacklevel=2)


def read_files(path: Path) -> list[TrajectoryGroup]:
    """The groups in a file, or in every file of a folder in the order of their names."""
    if not path.is_dir():
        return groups_of(_read_table(path).to_pylist())
    # Path.rglob raises when a folder is moved away while it walks.
    files = sorted(
        Path(folder, name) for folder, _, names in os.walk(path) for name in names if name.endswith(".parquet")
    )
    if not files:
        raise FileNotFoundError(f"there is no parquet file under {path}")
    return [group for file in files for group in groups_of(_read_table(file).to_pylist())]


def _read_table(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path, partitioning=None)
        return table.select(SCHEMA.names).cast(SCHEMA)
    except (pa.ArrowInvalid, KeyError) as error:
        raise ValueError(f"{path} is not a parquet file of trajectories ({error}).") from error


def _write(path: Path, table: pa.Table) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            pq.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        was = "the file is as it was before" if path.exists() else "no file was written"
        raise OSError(
            error.errno,
            f"{error.strerror or error}; these trajectories are not kept, {was}. Make room and log them again.",
            str(path),
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
