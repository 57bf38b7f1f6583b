"""The file in which a step's trajectory groups reach whoever trains on them: its format, a writer and two readers.

`read_groups` gives back all that was written, `read_records` only what training reads, without building an object for
every token and message. Knows nothing of what is trained on.

The format, version 1: a line of JSON that names format, version and compression; then a block for each group, and one
that counts them. A block is a header (`_HEADER`: a tag, the lengths of four parts in bytes, two CRC-32) and the parts:
an index in JSON (rewards, the lengths of rows, their spans), the rows' logprobs as little-endian float64, their token
ids as little-endian int32, and compressed with zlib all else of the group in JSON.
"""

from __future__ import annotations

import functools
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import SEEK_CUR
from itertools import starmap
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from pydantic_core import from_json, to_json

from art_core import ArtError, History, TrajectoryGroup
from art_core.atomic_files import appearing

from .group_records import (
    LOGPROB,
    TOKEN_ID,
    AlteredChoice,
    GroupRecord,
    HistoryRecord,
    SampledRow,
    SampledSpan,
    TrajectoryRecord,
    UnreadChoice,
    record_of,
)
from .group_text import group_from_text, group_to_text

FORMAT = "art-trajectory-groups"
VERSION = 2
COMPRESSION = "zlib"
# Level 1 halves the file; 6 takes four times as long to save another fourteenth.
_LEVEL = 1
_HEADER = struct.Struct("<4s4Q2I")
_GROUP, _END = b"GRP\n", b"END\n"
_LONGEST_FIRST_LINE = 1000


class GroupsFileError(ArtError):
    """A file of trajectory groups is cut, damaged, of another version, or none at all."""


def write_groups(path: Path, groups: Iterable[TrajectoryGroup]) -> None:
    """Write the groups to `path`, which appears whole or not at all. Holds one group's text in memory at a time.

    Nothing of a group is dropped. Raises InvalidTrajectory, naming group and trajectory, for a value that cannot be
    written down, OSError when there is no room.
    """
    with appearing(path) as file:
        first = {"format": FORMAT, "version": VERSION, "compression": COMPRESSION}
        file.write(json.dumps(first).encode() + b"\n")
        count = 0
        for group in groups:
            _write_block(file, group, f"trajectory_groups[{count}]")
            count += 1
        file.write(_end(count))


def read_groups(path: Path) -> list[TrajectoryGroup]:
    """All that was written. Raises GroupsFileError, or OSError when the file can't be read."""
    return [_group(block, _record(block).trajectories) for block in _blocks(path)]


def read_records(path: Path) -> Iterator[GroupRecord]:
    """What training reads of each group, one at a time. Raises as `read_groups` does."""
    return map(_record, _blocks(path))


@dataclass(frozen=True, slots=True)
class _Block:
    """What training reads of one group: index and columns; and where in the file the text of all else lies."""

    path: Path
    index: bytes
    logprobs: npt.NDArray[np.float64]
    token_ids: npt.NDArray[np.int32]
    text_offset: int
    text_size: int
    text_crc: int


def _record(block: _Block) -> GroupRecord:
    exceptions, index = from_json(block.index)
    trajectories: list[TrajectoryRecord] = []
    whole = functools.cache(lambda: _group(block, trajectories))
    rows = _Rows(block)
    for t, (reward, histories) in enumerate(index):
        known = [
            HistoryRecord(
                [rows.next(*row) for row in given],
                list(starmap(UnreadChoice, unread)),
                list(starmap(AlteredChoice, altered)),
                partial(_history, whole, t, h),
            )
            for h, (given, unread, altered) in enumerate(histories)
        ]
        trajectories.append(TrajectoryRecord(reward, known))
    return GroupRecord(trajectories, exceptions)


class _Rows:
    """Takes a block's rows from its columns, one after the other."""

    def __init__(self, block: _Block) -> None:
        self._token_ids, self._logprobs = block.token_ids, block.logprobs

    def next(self, length: int, known: int, spans: list[list[int]]) -> SampledRow:
        row = SampledRow(self._token_ids[:length], self._logprobs[:known], list(starmap(SampledSpan, spans)))
        self._token_ids, self._logprobs = self._token_ids[length:], self._logprobs[known:]
        return row


def _history(whole: Callable[[], TrajectoryGroup], t: int, h: int) -> History:
    return whole()[t].histories()[h]


def _group(block: _Block, records: Sequence[TrajectoryRecord]) -> TrajectoryGroup:
    with block.path.open("rb") as file:
        file.seek(block.text_offset)
        text = _read(block.path, file, block.text_size)
    if zlib.crc32(text) != block.text_crc:
        raise _damaged(block.path)
    return group_from_text(zlib.decompress(text), records)


def _blocks(path: Path) -> Iterator[_Block]:
    with path.open("rb") as file:
        _check_first_line(path, file.readline(_LONGEST_FIRST_LINE))
        size, count = path.stat().st_size, 0
        while True:
            header = _read(path, file, _HEADER.size)
            if header == _end(count) and file.tell() == size:
                return
            tag, index, logprobs, ids, text, crc, text_crc = _HEADER.unpack(header)
            if tag != _GROUP or index + logprobs + ids + text > size - file.tell():
                raise _damaged(path)
            parts = _read(path, file, index + logprobs + ids)
            if zlib.crc32(parts) != crc:
                raise _damaged(path)
            yield _Block(
                path,
                bytes(parts[:index]),
                np.frombuffer(parts, LOGPROB, logprobs // LOGPROB.itemsize, index),
                np.frombuffer(parts, TOKEN_ID, ids // TOKEN_ID.itemsize, index + logprobs),
                file.tell(),
                text,
                text_crc,
            )
            file.seek(text, SEEK_CUR)
            count += 1


def _check_first_line(path: Path, line: bytes) -> None:
    try:
        said = json.loads(line)
        name, version, compression = said["format"], said["version"], said["compression"]
    except (ValueError, TypeError, KeyError):
        name = version = compression = None
    if name != FORMAT:
        raise GroupsFileError(f"{path} is not a file of trajectory groups, such as art-engine-kit writes.")
    if (version, compression) != (VERSION, COMPRESSION):
        raise GroupsFileError(
            f"{path} holds trajectory groups in version {version} of the format, compressed with {compression}; this"
            f" art-engine-kit reads version {VERSION}, compressed with {COMPRESSION}. Install the same art-engine-kit"
            " where the file is written and where it is read."
        )


def _read(path: Path, file: BinaryIO, size: int) -> bytearray:
    # A bytearray, since an array over bytes could not be written to, which torch warns of.
    content = bytearray(file.read(size))
    if len(content) != size:
        raise _damaged(path)
    return content


def _damaged(path: Path) -> GroupsFileError:
    return GroupsFileError(f"{path} is damaged or cut short; its trajectories cannot be read. Write it anew.")


def _end(count: int) -> bytes:
    return _HEADER.pack(_END, count, 0, 0, 0, 0, 0)


def _write_block(file: BinaryIO, group: TrajectoryGroup, where: str) -> None:
    record = record_of(group)
    histories = [history for trajectory in record.trajectories for history in trajectory.histories]
    rows = [row for history in histories for row in history.rows]
    parts = [
        _index(record),
        b"".join(row.logprobs.tobytes() for row in rows),
        b"".join(row.token_ids.tobytes() for row in rows),
    ]
    columns = b"".join(parts)
    text = zlib.compress(group_to_text(group, record.trajectories, where=where), _LEVEL)
    file.write(_HEADER.pack(_GROUP, *map(len, (*parts, text)), zlib.crc32(columns), zlib.crc32(text)))
    file.write(columns)
    file.write(text)


def _index(record: GroupRecord) -> bytes:
    trajectories = [
        (
            trajectory.reward,
            [
                (
                    [(len(row.token_ids), len(row.logprobs), row.spans) for row in history.rows],
                    history.unread,
                    history.altered,
                )
                for history in trajectory.histories
            ],
        )
        for trajectory in record.trajectories
    ]
    index = to_json((record.exceptions, trajectories), inf_nan_mode="constants")
    # Filled up with spaces, so that the columns behind it lie where arrays may.
    return index + b" " * (-len(index) % LOGPROB.itemsize)
