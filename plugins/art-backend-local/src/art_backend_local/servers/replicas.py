"""The inference servers that serve the same models together: each holds every adapter, requests go to the idlest.

A server that dies is taken out, brought back with every adapter, verified, and only then asked again. With one server
this is what a restart is. Knows adapters by name; what they mean, and which of them may be spared, its tenants know.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from art_core import ArtError, EngineCall, InferenceEngine
from art_core.errors import EngineRefused, ProcessFailed

from .engine_connection import EngineConnection
from .inference_server import BrokenServer, InferenceServer, OnProgress
from .verification import CanaryAnswers, ask_canary, verify_adapter

RESTART_ATTEMPTS = 3
RESTART_PAUSE_S = 1.0
LONGEST_PAUSE = 10
# For how long a server that broke a connection is asked only if there is no other; by then its death was noticed.
SUSPECT_S = 2.0


class Tenant(Protocol):
    """One model that is served from here."""

    @property
    def last_asked(self) -> float:
        """When it was last asked, in monotonic seconds."""

    def lost(self) -> set[str]:
        """Every server is gone. Gives the adapters that must be loaded again."""

    def restored(self, adapter: str) -> None:
        """An adapter that was lost is served again, if it is one of its own."""

    def can_spare(self, adapter: str) -> bool:
        """False for an adapter of its own without which it can't go on."""

    async def give_up_one(self) -> bool:
        """Unload an adapter that nobody uses, and say whether there was one."""

    async def rest(self) -> bool:
        """Unload the adapter that its name is routed to, unless somebody is asking it, until somebody asks again; say
        whether that was done.
        """


@dataclass(frozen=True)
class _Held:
    folder: Path
    fingerprint: str


@dataclass(eq=False)
class Replica:
    """One server in its turn: `connection` is None while it is out."""

    server: InferenceServer
    connection: EngineConnection | None = None
    in_flight: int = 0
    restarts: int = 0
    suspect_until: float = 0.0
    broken: ProcessFailed | None = None
    watch: asyncio.Task[None] | None = field(default=None, repr=False)


class Replicas:
    """For one event loop. New requests wait while `gate` is not set. Whoever loads or unloads adapters holds
    `adapters_lock`. `report` takes a sentence for the user. `attached`: the servers are the user's.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        servers: Sequence[InferenceServer],
        *,
        base_model: Path,
        max_adapters: int,
        max_lora_rank: int,
        attached: bool,
        report: Callable[[str], None],
    ) -> None:
        self.engine = engine
        self.base_model = base_model
        self.max_adapters = max_adapters
        self.max_lora_rank = max_lora_rank
        self.attached = attached
        self.adapters_lock = asyncio.Lock()
        self.gate = asyncio.Event()
        self.gate.set()
        self.members = tuple(Replica(server) for server in servers)
        self._report = report
        self._held: dict[str, _Held] = {}
        self._some_up = asyncio.Event()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._tenants: list[Tenant] = []

    def __repr__(self) -> str:
        return f"Replicas({self.engine.name}, {len(self._serving)} of {len(self.members)} up)"

    @property
    def _serving(self) -> list[Replica]:
        return [member for member in self.members if member.connection is not None]

    @property
    def up(self) -> bool:
        """True while at least one server answers and holds what must be served."""
        return bool(self._serving)

    @property
    def broken(self) -> ProcessFailed | None:
        """Why none is restarted any more; None while one is there or may come back."""
        if any(member.broken is None for member in self.members):
            return None
        return self.members[0].broken

    @property
    def restarts(self) -> int:
        """How often one of them came back."""
        return sum(member.restarts for member in self.members)

    def add_tenant(self, tenant: Tenant) -> None:
        """From now on it depends on these servers."""
        self._tenants.append(tenant)

    def remove_tenant(self, tenant: Tenant) -> None:
        """It depends on them no more."""
        self._tenants.remove(tenant)

    async def start(self, on_progress: OnProgress | None = None) -> None:
        """Start all servers, and watch over them. Raises ArtError, with none left running, when one does not start."""
        starts = [asyncio.create_task(member.server.start(on_progress)) for member in self.members]
        try:
            for member, connection in zip(self.members, await asyncio.gather(*starts), strict=True):
                member.connection = connection
        except BaseException:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            await self.close()
            raise
        self._some_up.set()
        for member in self.members:
            member.watch = asyncio.create_task(self._watch_over(member), name=f"watch {member.server.title}")

    async def ready(self, limit_s: float) -> None:
        """Wait until one is up. Raises ProcessFailed when all are broken or none is up within `limit_s`."""
        try:
            async with asyncio.timeout(limit_s):
                await self._some_up.wait()
        except TimeoutError:
            raise ProcessFailed(
                f"the inference server {self.engine.name} was lost and is not back after {limit_s:g} s."
            ) from None
        if self.broken is not None:
            raise self.broken

    @property
    def in_flight(self) -> int:
        """How many requests they are answering."""
        return sum(member.in_flight for member in self.members)

    def begin_request(self) -> tuple[Replica, EngineConnection]:
        """Count a request to the server with the fewest under way, until `end_request`. Raises ProcessFailed when none
        is up.
        """
        now = time.monotonic()
        member = min(self._serving, key=lambda m: (m.suspect_until > now, m.in_flight), default=None)
        if member is None or member.connection is None:
            raise self._none_up()
        member.in_flight += 1
        self._quiet.clear()
        return member, member.connection

    def end_request(self, member: Replica) -> None:
        """A request that was begun has ended, in whatever way."""
        member.in_flight -= 1
        if not self.in_flight:
            self._quiet.set()

    async def drained(self, limit_s: float) -> None:
        """Wait until no request is under way. Raises TimeoutError."""
        await asyncio.wait_for(self._quiet.wait(), limit_s)

    def suspect(self, member: Replica) -> None:
        """A request found it dead: others are asked first for a moment."""
        member.suspect_until = time.monotonic() + SUSPECT_S

    async def load(self, adapter: str, folder: Path, fingerprint: str) -> None:
        """Have every server hold the adapter. `fingerprint` stands for its weights. Raises EngineRefused."""
        self._held[adapter] = _Held(folder, fingerprint)
        await self._everywhere(lambda connection: connection.load(adapter, folder, fingerprint))

    def holds(self, adapter: str) -> bool:
        """True for an adapter that was loaded, or is being."""
        return adapter in self._held

    async def ask_canary(self, adapter: str, prompts: Sequence[Sequence[int]]) -> dict[EngineConnection, CanaryAnswers]:
        """What every server says to canary prompts under the adapter's name. Raises EngineRefused."""
        found: dict[EngineConnection, CanaryAnswers] = {}

        async def ask(connection: EngineConnection) -> None:
            found[connection] = await ask_canary(connection, adapter, prompts)

        await self._everywhere(ask)
        return found

    async def verify(self, adapter: str, folder: Path, answered: Mapping[EngineConnection, CanaryAnswers]) -> None:
        """See that every server answers as the checkpoint in `folder`. Raises EngineRefused.

        Those that have `answered` its canary already aren't asked again; a server that came back since has not.
        """
        await self._everywhere(lambda connection: verify_adapter(connection, adapter, folder, answered.get(connection)))

    async def unload(self, adapter: str) -> None:
        """Have every server forget an adapter. Nothing happens for one that isn't held, or when all are down."""
        if self._held.pop(adapter, None) is not None and self.up:
            await self._everywhere(lambda connection: connection.unload(adapter))

    async def make_room(self, tenant: Tenant) -> None:
        """Unload an adapter when all places are taken: an idle one, else that of the model which was asked longest ago
        and can be without it for a while. Raises EngineRefused when every one is in use.
        """
        while len(self._held) >= self.max_adapters:
            others = sorted((each for each in self._tenants if each is not tenant), key=lambda each: each.last_asked)
            gave_up = [each.give_up_one for each in (*others, tenant)]
            for unload in (*gave_up, *(each.rest for each in others)):
                if await unload():
                    break
            else:
                raise EngineRefused(
                    self.engine.name,
                    "load another adapter",
                    f"all {self.max_adapters} places are taken by steps that are routed, leased or answering."
                    " End leases, or give LocalBackend a larger max_adapters.",
                )

    async def unload_strangers(self, prefix: str) -> list[str]:
        """Have servers of the user's forget what an earlier host left there under names that begin with `prefix`."""
        found = [await member.connection.unload_strangers(prefix) for member in self.members if member.connection]
        return sorted({adapter for stale in found for adapter in stale})

    async def call(self, call: EngineCall) -> None:
        """Make a control call to every server. Raises EngineRefused with the engine's reason."""
        await self._everywhere(lambda connection: connection.call(call))

    def held_other_weights(self, adapter: str, fingerprint: str | None) -> bool:
        """True when a server was given other weights under this name (None: any weights at all)."""
        connections = (member.connection for member in self._serving)
        return any(c is not None and c.held_other_weights(adapter, fingerprint) for c in connections)

    async def close(self) -> None:
        """Let all servers go. A second call does nothing."""
        watches = [member.watch for member in self.members if member.watch is not None]
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)
        for member in self.members:
            member.watch = member.connection = None
        stopped = await asyncio.gather(*(member.server.close() for member in self.members), return_exceptions=True)
        for problem in stopped:
            if isinstance(problem, BaseException):
                raise problem

    async def _everywhere(self, work: Callable[[EngineConnection], Awaitable[object]]) -> None:
        """Do it in all servers at once. One that doesn't answer is given up, as long as another did it: when it is
        back it gets everything again.
        """
        asked = [(member, member.connection) for member in self._serving if member.connection is not None]
        if not asked:
            raise self._none_up()
        results = await asyncio.gather(*(work(connection) for _, connection in asked), return_exceptions=True)
        failed = [(member, r) for (member, _), r in zip(asked, results, strict=True) if isinstance(r, BaseException)]
        silent = [(member, error) for member, error in failed if isinstance(error, ProcessFailed)]
        for _, error in failed:
            if not isinstance(error, ProcessFailed):
                raise error
        if len(silent) == len(asked):
            raise silent[0][1]
        for member, error in silent:
            self._report(f"The {member.server.title} is taken out: {error}")
            member.connection = None
            member.server.give_up()

    async def _watch_over(self, member: Replica) -> None:
        while True:
            reason = await member.server.gone()
            member.connection = None
            if not self._serving:
                self._some_up.clear()
                self._forget_all_but({adapter for tenant in self._tenants for adapter in tenant.lost()})
            others = f" {len(self._serving)} of {len(self.members)} go on." if len(self.members) > 1 else ""
            self._report(reason + others)
            error = await self._bring_back(member)
            if error is not None:
                member.broken = error
                self._report(str(error))
                if self.broken is not None:
                    self._some_up.set()
                return
            self._report(f"The {member.server.title} is back, with the adapters that it served.")

    def _forget_all_but(self, wanted: set[str]) -> None:
        self._held = {adapter: held for adapter, held in self._held.items() if adapter in wanted}

    async def _bring_back(self, member: Replica) -> ProcessFailed | None:
        cause: Exception | None = None
        # Who runs a server of their own may take any time over it.
        for attempt in itertools.count() if self.attached else range(RESTART_ATTEMPTS):
            await asyncio.sleep(RESTART_PAUSE_S * min(attempt, LONGEST_PAUSE))
            try:
                connection = await member.server.start_again()
                async with self.adapters_lock:
                    await self._restore(member, connection)
            except BrokenServer as error:
                return error
            except Exception as error:
                cause = error
            else:
                return None
        await member.server.close()
        return ProcessFailed(
            f"the {member.server.title} was lost and could not be brought back in {RESTART_ATTEMPTS} attempts. Mend the"
            f" cause and register the model again. The last attempt: {cause}"
        )

    async def _restore(self, member: Replica, connection: EngineConnection) -> None:
        """Give a server everything that is held, verified, and let it serve."""
        for adapter, held in list(self._held.items()):
            try:
                await connection.load(adapter, held.folder, held.fingerprint)
                await verify_adapter(connection, adapter, held.folder)
            except ArtError as error:
                spared = not self._serving and all(tenant.can_spare(adapter) for tenant in self._tenants)
                if isinstance(error, ProcessFailed) or not spared:
                    raise
                del self._held[adapter]
                self._report(f"{adapter} could not be loaded again after the engine's restart: {error}")
        alone = not self._serving
        member.connection = connection
        member.restarts += 1
        if alone:
            for adapter in self._held:
                for tenant in self._tenants:
                    tenant.restored(adapter)
        self._some_up.set()

    def _none_up(self) -> ProcessFailed:
        return ProcessFailed(f"the inference server {self.engine.name} is down and being brought back.")
