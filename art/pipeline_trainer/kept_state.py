"""What a pipeline must not lose when it is killed: how far the scenarios are, which are unfinished, which groups wait.

One SQLite file beside the model's state.json, held by one run at a time. Knows numbers, versions and groups as text;
knows neither models nor training.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from art_core import ArtError, TrajectoryGroup

T = TypeVar("T")
FILE = "pipeline.sqlite3"
_TABLES = """
create table if not exists cursor (one integer primary key check (one = 1), handed_out integer not null, counts text);
create table if not exists unfinished (scenario integer primary key, attempts integer not null);
create table if not exists groups (scenario integer primary key, version integer not null, actor_s real not null,
                                   body text not null, trained_from integer);
create table if not exists skipped (step integer primary key);
insert or ignore into cursor values (1, 0, '{}');
"""


class PipelineRunning(ArtError):
    """Another pipeline trains this very model."""


@dataclass(frozen=True)
class KeptGroup:
    """A finished group that was never trained."""

    scenario: int
    version: int
    actor_s: float
    group: TrajectoryGroup


@dataclass(frozen=True)
class Kept:
    """What an earlier run left: `unfinished` are scenarios that were handed out, with the attempts made at each, and
    `skipped` are numbers that no step has.
    """

    handed_out: int
    unfinished: Mapping[int, int]
    groups: tuple[KeptGroup, ...]
    counts: Mapping[str, int]
    skipped: frozenset[int]


@dataclass(frozen=True, eq=False)
class _Change:
    make: Callable[[sqlite3.Connection], None]
    written: asyncio.Future[None]


class KeptState:
    """The file. A change is whole once its call has returned, and survives however this process ends. Those that wait
    for the disk at the same time are written together.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = FileLock(folder / f".{FILE}.lock")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="art-pipeline-state")
        self._db: sqlite3.Connection | None = None
        self._waiting: list[_Change] = []
        self._writing: asyncio.Task[None] | None = None

    async def open(self, step: int, *, resume: bool) -> Kept:
        """What was kept. A batch that was being trained from a version below `step` was trained; else it waits again.

        Raises PipelineRunning.
        """
        return await self._do(lambda: self._open(step, resume))

    async def handed_out(self, scenario: int, attempts: int, total: int) -> None:
        """A scenario begins."""
        await self._run(
            ("insert or replace into unfinished values (?, ?)", (scenario, attempts)),
            ("update cursor set handed_out = max(handed_out, ?)", (total,)),
        )

    async def finished(
        self, scenario: int, version: int = 0, actor_s: float = 0.0, group: TrajectoryGroup | None = None
    ) -> None:
        """A scenario is done with; its group waits to be trained when there is one."""

        def write(db: sqlite3.Connection) -> None:
            db.execute("delete from unfinished where scenario = ?", (scenario,))
            if group is not None:
                body = json.dumps(group.for_logging())
                db.execute("insert into groups values (?, ?, ?, ?, null)", (scenario, version, actor_s, body))

        await self._change(write)

    async def taken(self, scenarios: Collection[int], step: int) -> None:
        """These groups are about to be trained from a step."""
        await self._run(*(("update groups set trained_from = ? where scenario = ?", (step, s)) for s in scenarios))

    async def gone(
        self, scenarios: Collection[int], counts: Mapping[str, int], *, skipped: Collection[int] = ()
    ) -> None:
        """These groups were trained or discarded; these numbers have no step."""
        await self._run(
            *(("delete from groups where scenario = ?", (scenario,)) for scenario in scenarios),
            ("update cursor set counts = ?", (json.dumps(dict(counts)),)),
            *(("insert or ignore into skipped values (?)", (step,)) for step in skipped),
        )

    async def close(self) -> None:
        """Write what waits, and let the file go."""
        if self._writing is not None:
            await asyncio.wait({self._writing})
        await self._do(self._close)
        self._thread.shutdown(wait=False)

    def _open(self, step: int, resume: bool) -> Kept:
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise PipelineRunning(
                f"another PipelineTrainer is training the model in {self._folder}; it holds {self._lock.lock_file}."
                " Stop that one first, or give this model another name."
            ) from error
        db = self._db = sqlite3.connect(self._folder / FILE, check_same_thread=False)
        db.execute("pragma journal_mode = wal")
        db.executescript(_TABLES)
        with db:
            if not resume:
                for table in ("groups", "unfinished", "skipped"):
                    db.execute(f"delete from {table}")
                db.execute("update cursor set handed_out = 0, counts = '{}'")
            db.execute("delete from groups where trained_from < ?", (step,))
            db.execute("update groups set trained_from = null")
        handed_out, counts = db.execute("select handed_out, counts from cursor").fetchone()
        return Kept(
            handed_out=handed_out,
            unfinished=dict(db.execute("select scenario, attempts from unfinished")),
            groups=tuple(
                KeptGroup(scenario, version, actor_s, TrajectoryGroup.model_validate(json.loads(body)))
                for scenario, version, actor_s, body in db.execute(
                    "select scenario, version, actor_s, body from groups"
                )
            ),
            counts=json.loads(counts),
            skipped=frozenset(number for (number,) in db.execute("select step from skipped")),
        )

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None
        self._lock.release()

    async def _run(self, *statements: tuple[str, tuple[object, ...]]) -> None:
        def write(db: sqlite3.Connection) -> None:
            for statement, values in statements:
                db.execute(statement, values)

        await self._change(write)

    async def _change(self, make: Callable[[sqlite3.Connection], None]) -> None:
        change = _Change(make, asyncio.get_running_loop().create_future())
        self._waiting.append(change)
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_waiting(), name="write the pipeline's state")
        await change.written

    async def _write_waiting(self) -> None:
        """Write until nothing waits: what comes while a transaction is written is the next one."""
        changes: list[_Change] = []
        try:
            while self._waiting:
                changes, self._waiting = self._waiting, []
                try:
                    failures = await self._do(partial(self._write, [change.make for change in changes]))
                except Exception as error:  # the file was let go
                    failures = [error] * len(changes)
                for change, failure in zip(changes, failures, strict=True):
                    if change.written.done():
                        continue  # whoever asked for it waits no more
                    if failure is None:
                        change.written.set_result(None)
                    else:
                        change.written.set_exception(failure)
        finally:
            # Where this was cut off, nobody waits on.
            for change in (*changes, *self._waiting):
                change.written.cancel()
            self._writing = None

    def _write(self, changes: Sequence[Callable[[sqlite3.Connection], None]]) -> Sequence[Exception | None]:
        """Make them in one transaction, or each in its own where one of them fails; gives what became of each."""
        try:
            self._transact(changes)
        except Exception as error:
            if len(changes) == 1:
                return [error]
            return [failure for change in changes for failure in self._write([change])]
        return [None] * len(changes)

    def _transact(self, changes: Sequence[Callable[[sqlite3.Connection], None]]) -> None:
        db = self._db
        if db is None:
            raise AssertionError("the pipeline's state is not open")
        with db:
            for make in changes:
                make(db)

    async def _do(self, work: Callable[[], T]) -> T:
        # One thread, so that changes happen in the order in which they were asked for.
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
