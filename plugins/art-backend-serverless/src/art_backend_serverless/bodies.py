"""The body of a large request, written to a temporary file piece by piece, so that memory stays small, its size is
known, and it can be sent again as it was.

Knows JSON and gzip; knows no connection. Encoding happens in a thread.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any, cast

from pydantic import BaseModel
from pydantic_core import to_json

from art_core import Trajectory, TrajectoryGroup

_PIECE = 256 * 2**10
_LEVEL = 4  # of gzip: token ids and logprobs shrink to a fourth, nearly as fast as they can be sent


@dataclass(frozen=True, kw_only=True)
class Spooled:
    """A body in a file. `sha256` is of what it says, before it was compressed, `plain_size` the bytes of that."""

    file: IO[bytes]
    size: int
    plain_size: int
    sha256: str
    content_type: str
    content_encoding: str | None

    def headers(self) -> dict[str, str]:
        """What the request says of it."""
        said = {"Content-Type": self.content_type, "Content-Length": str(self.size)}
        return said if self.content_encoding is None else {**said, "Content-Encoding": self.content_encoding}

    async def pieces(self, on_sent: Callable[[int], None]) -> AsyncIterator[bytes]:
        """The whole from its beginning; `on_sent` is told how many bytes were taken so far."""
        sent = 0
        while piece := await asyncio.to_thread(self._read, sent):
            yield piece
            sent += len(piece)
            on_sent(sent)

    def _read(self, at: int) -> bytes:
        self.file.seek(at)
        return self.file.read(_PIECE)


@asynccontextmanager
async def spooled(pieces: Iterator[bytes], *, content_type: str, compress: bool) -> AsyncIterator[Spooled]:
    """Write `pieces` to a file that nobody else sees and that goes with the block. Raises OSError naming the folder."""
    left = threading.Event()
    with tempfile.TemporaryFile(prefix="art-upload-") as file:
        plain = cast("IO[bytes]", file)
        writing = asyncio.create_task(
            asyncio.to_thread(_write, plain, pieces, content_type, compress, left), name="write the body of an upload"
        )
        try:
            try:
                body = await asyncio.shield(writing)
            except OSError as error:
                with suppress(OSError):
                    plain.close()  # it tries once more to write what it still holds
                raise OSError(
                    f"what is to be uploaded could not be written to {tempfile.gettempdir()}: {error}. Nothing was"
                    " sent. Free some space there, or name another folder in TMPDIR."
                ) from error
            yield body
        finally:
            # The thread stops at its next piece; the file is closed when it has.
            left.set()
            await asyncio.gather(writing, return_exceptions=True)


def message_with_groups(message: BaseModel, groups: Sequence[TrajectoryGroup]) -> Iterator[bytes]:
    """A message of the wire whose `trajectory_groups` are these, a trajectory at a time. Of `message` itself that field
    is left out.
    """
    head = message.model_dump_json(exclude={"trajectory_groups"}, exclude_none=True).encode()
    yield head[:-1] + (b"," if head != b"{}" else b"") + b'"trajectory_groups":['
    for number, group in enumerate(groups):
        yield b"," if number else b""
        rest = group.model_copy(update={"trajectories": []}).for_logging()
        del rest["trajectories"]
        yield _json(rest)[:-1] + (b"," if rest else b"") + b'"trajectories":['
        for place, trajectory in enumerate(group):
            yield (b"," if place else b"") + _json(trajectory.for_logging())
        yield b"]}"
    yield b"]}"


def conversations(trajectories: Sequence[Trajectory]) -> Iterator[bytes]:
    """Lines of JSON, a conversation each: its messages, and its tools where it has any."""
    for trajectory in trajectories:
        row: dict[str, Any] = {"messages": trajectory.messages()}
        if trajectory.tools is not None:
            row["tools"] = trajectory.tools
        yield _json(row) + b"\n"


def _json(value: Any) -> bytes:
    try:
        return to_json(value, inf_nan_mode="constants")
    except (ValueError, UnicodeEncodeError):
        # A lone surrogate, which JSON writes as an escape.
        return json.dumps(value).encode()


def _write(
    file: IO[bytes], pieces: Iterator[bytes], content_type: str, compress: bool, left: threading.Event
) -> Spooled:
    digest, size = hashlib.sha256(), 0
    # With no time in its head, the same content is the same body.
    packed = gzip.GzipFile(fileobj=file, mode="wb", compresslevel=_LEVEL, mtime=0) if compress else None
    out: Any = file if packed is None else packed
    for piece in pieces:
        if left.is_set():
            break
        digest.update(piece)
        size += len(piece)
        out.write(piece)
    if packed is not None:
        packed.close()
    file.flush()
    return Spooled(
        file=file,
        size=file.tell(),
        plain_size=size,
        sha256=digest.hexdigest(),
        content_type=content_type,
        content_encoding="gzip" if compress else None,
    )
