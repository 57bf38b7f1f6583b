"""One model as the host serves it: its checkpoints on disk, which of them the engine holds, and how one gets there.

Implements art_core's Publisher with an engine server. Knows nothing of HTTP, training or clients.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from art_core import ArtError, CheckpointRef, PublicationReceipt
from art_core.cancellation import to_the_end
from art_core.errors import (
    CheckpointInUse,
    CheckpointNotFound,
    CorruptCheckpoint,
    ProcessFailed,
    PublicationFailed,
)
from art_core.publication import publish
from art_engine_kit.adapter_files import check_adapter
from art_engine_kit.base_shapes import LinearShapes
from art_engine_kit.checkpoint_folder import read_manifest, whole_steps
from art_engine_kit.live_folders import remove_folder
from art_engine_kit.model_folder import ModelFolder
from art_engine_kit.plain_adapter import link_canary
from art_engine_kit.served_steps import ServedSteps
from art_engine_kit.training_wire import AdapterWritten

from ..adapters.fingerprint import fingerprint
from ..adapters.served_copies import forget_served_copy, served_folder
from ..servers.replicas import Replicas
from ..wire.deployment import Deployment
from .early_load import EarlyLoad
from .training_hold import TrainingTurn

# Beside the leased, routed and busy ones, the newest steps that stay loaded so that asking for them costs nothing.
KEEP_IDLE = 2
ENGINE_BACK_LIMIT_S = 300.0


class HostedModel:
    """A registered model. For one event loop.

    `ensure_loaded` brings a step into the engine, `publish` moves the route as well. `known` are the whole steps on
    disk when last looked; those in `training_from` are in use by a training job and are not deleted. `turn` says who
    trains it. `ended` is set whenever a request has ended or the route has moved, `gone` once it isn't served here any
    more. `last_asked` is in monotonic seconds.
    """

    def __init__(
        self,
        folder: ModelFolder,
        *,
        base_shapes: LinearShapes,
        deployment: Deployment,
        server: Replicas,
        report: Callable[[str], None],
    ) -> None:
        self.key = folder.key
        self.folder = folder
        self.base_shapes = base_shapes
        self.deployment = deployment
        self.server = server
        self.steps = ServedSteps(folder.key)
        self.known: tuple[int, ...] = ()
        self.training_from: set[int] = set()
        self.publishing = asyncio.Lock()
        self.ended = asyncio.Event()
        self.gone = asyncio.Event()
        self.last_asked = time.monotonic()
        self.turn = TrainingTurn(folder.key)
        self.report = report
        self._loading: dict[int, asyncio.Task[None]] = {}
        self._going: set[int] = set()
        self._early: EarlyLoad | None = None

    @property
    def published(self) -> tuple[int, ...]:
        """The known steps that may be asked for. One that is saved and not yet published may still be refused."""
        routed = self.steps.routed
        return tuple(step for step in self.known if routed is not None and step <= routed and step not in self._going)

    async def on_disk(self) -> dict[int, Path]:
        """Every whole step on disk, oldest first; corrupt ones are warned of and left alone."""
        there = await asyncio.to_thread(whole_steps, self.folder.checkpoints)
        self.known = tuple(there)
        return there

    async def latest(self) -> CheckpointRef:
        """The latest whole checkpoint. Raises CheckpointNotFound."""
        there = await self.on_disk()
        if not there:
            raise CheckpointNotFound(f"{self.key} has no whole checkpoint in {self.folder.checkpoints}.")
        return self.ref(max(there))

    def ref(self, step: int) -> CheckpointRef:
        """The checkpoint of a step, whether or not it is there."""
        return self.folder.checkpoint(step)

    async def next_step(self) -> int:
        """The step that the next training job makes: after every whole one, and never a name that the engine held."""
        step = max((await self.on_disk()), default=0) + 1
        while self.server.held_other_weights(self.ref(step).adapter_name, None):
            step += 1
        return step

    async def publish(self, checkpoint: CheckpointRef) -> PublicationReceipt:
        """Take a checkpoint through check, load, verify and route. Raises PublicationFailed.

        When the engine dies meanwhile it is tried once more with the restarted one.
        """
        async with self.publishing:
            try:
                receipt = await self._publish(checkpoint)
            except BaseException:
                await to_the_end(self.forget_early())
                raise
            self._early = None
        try:
            await asyncio.to_thread(self.folder.published(checkpoint.step).touch)
        except OSError as error:
            # It is served, and says so; a later host only asks its client's plugins about it once more.
            self.report(f"{checkpoint.inference_name} is published, which could not be noted on disk: {error}")
        return receipt

    async def _publish(self, checkpoint: CheckpointRef) -> PublicationReceipt:
        restarts = self.server.restarts
        try:
            return await publish(checkpoint, self)
        except PublicationFailed as error:
            died = self.server.restarts != restarts or not self.server.up or _engine_gone(error)
            if not died:
                raise
            self.report(f"{error} Trying again with the restarted engine.")
            await self.server.ready(ENGINE_BACK_LIMIT_S)
            return await publish(checkpoint, self)

    def load_early(self, step: int, written: AdapterWritten) -> None:
        """Bring a step's adapter into the engine while its checkpoint is still being written. Nobody is served by it
        until it is published, which goes on from what is done by then; `forget_early` takes it out again.
        """
        self._early = EarlyLoad(
            self.ref(step),
            written,
            tenant=self,
            server=self.server,
            base_shapes=self.base_shapes,
            folder=self.folder,
        )

    async def forget_early(self) -> None:
        """Unload what was loaded early and is not published, if there is such a one."""
        if self._early is not None:
            # It may be loading just now, under the lock.
            await self._early.stop()
            async with self.server.adapters_lock:
                await self._drop_early()

    async def _drop_early(self) -> None:
        early, self._early = self._early, None
        if early is not None:
            await early.stop()
            await self._unload(early.checkpoint.step)

    async def pending(self) -> int | None:
        """The latest whole step when it isn't published; None otherwise."""
        latest = (await self.latest()).step
        return latest if self.steps.routed is not None and latest > self.steps.routed else None

    async def last_published(self) -> CheckpointRef:
        """The latest whole checkpoint that was published before, or the oldest one when none was."""
        await self.latest()
        published = [step for step in self.known if self.folder.published(step).exists()]
        return self.ref(max(published) if published else min(self.known))

    async def ensure_loaded(self, step: int) -> None:
        """Have the engine hold a step, checked and verified, without routing to it. Raises CheckpointNotFound listing
        the steps that there are.
        """
        if step in self.steps.loaded:
            return
        task = self._loading.get(step)
        if task is None:
            # One load for all who ask; it goes on when one of them leaves.
            task = self._loading[step] = asyncio.create_task(self._load_on_demand(step), name=f"load {self.key}@{step}")
            task.add_done_callback(lambda done: self._loading_done(step, done))
        await asyncio.shield(task)

    def lost(self) -> set[str]:
        """Tenant: the routed step's adapter, unless it rests, and the leased ones'."""
        return {self.ref(step).adapter_name for step in self.steps.lose_all()}

    def restored(self, adapter: str) -> None:
        """Tenant: one of ours is served again."""
        step = self.step_of(adapter)
        if step is not None:
            self.steps.add(step)

    def can_spare(self, adapter: str) -> bool:
        """Tenant: any but the routed step's."""
        step = self.step_of(adapter)
        return step is None or step != self.steps.routed

    async def give_up_one(self) -> bool:
        """Tenant: an idle step."""
        idle = self.steps.idle()
        if idle:
            await self.give_up(idle[0])
        elif self._early is not None and not self.turn.taken:
            # Its client is gone, and the next one to publish it can load it again.
            await self._drop_early()
        else:
            return False
        return True

    async def rest(self) -> bool:
        """Tenant: the routed step, until somebody asks for it."""
        if not self.steps.can_rest:
            return False
        await self._unload(self.steps.rest())
        return True

    def step_of(self, adapter: str) -> int | None:
        """The step that an engine knows under this name, None for another model's."""
        mine, _, step = adapter.rpartition("@")
        return int(step) if f"{mine}@" == self.adapter_prefix else None

    @property
    def adapter_prefix(self) -> str:
        """What the names of all its adapters begin with."""
        return self.ref(0).adapter_name.removesuffix("0")

    async def tidy(self) -> None:
        """Unload idle steps but the newest few."""
        async with self.server.adapters_lock:
            for step in self.steps.idle(keep=KEEP_IDLE):
                # Unloading the one before took a while.
                if not self.steps.in_use(step):
                    await self.give_up(step)

    async def give_up(self, step: int) -> None:
        """Unload one step that nobody uses. Call it with the server's `adapters_lock`, so that nobody loads it
        meanwhile.

        Raises CheckpointInUse.
        """
        self.steps.remove(step)
        await self._unload(step)

    async def _unload(self, step: int) -> None:
        try:
            await self.server.unload(self.ref(step).adapter_name)
        except ArtError as error:
            if self.server.up:
                self.report(f"{self.key}@{step} could not be unloaded: {error}")
        await asyncio.to_thread(forget_served_copy, self.ref(step), self.folder)

    async def leave(self) -> None:
        """Unload everything once the requests that are under way have ended. Nobody asks any more."""
        await self.forget_early()
        while True:
            self.ended.clear()
            if not any(self.steps.in_flight(step) for step in self.steps.loaded):
                break
            await self.ended.wait()
        async with self.server.adapters_lock:
            for step in sorted(self.steps.loaded):
                await self._unload(step)
            self.steps.lose_all()

    async def delete(self, steps: list[int]) -> list[int]:
        """Delete steps from disk, unloading idle ones. Raises CheckpointInUse before anything is deleted."""
        there = await self.on_disk()
        wanted = [step for step in sorted(set(steps)) if step in there]
        in_use = [step for step in wanted if self._in_use(step)]
        if in_use:
            raise CheckpointInUse(
                f"{self.key}: step {', '.join(map(str, in_use))} is served, leased or being trained from, so nothing"
                " was deleted. End its leases, or leave it out."
            )
        return await self._delete(wanted)

    def _in_use(self, step: int) -> bool:
        return self.steps.in_use(step) or step in self.training_from or step in self._loading

    async def _delete(self, unused: list[int]) -> list[int]:
        """Delete steps that nobody uses just now, which is so until the first await; from then on nobody can."""
        going = [step for step in unused if step not in self._going]
        loaded = self.steps.loaded.intersection(going)
        self._going.update(going)
        for step in loaded:
            self.steps.remove(step)
        try:
            for step in going:
                if step in loaded:
                    async with self.server.adapters_lock:
                        await self._unload(step)
                await asyncio.to_thread(self._remove, step)
                self.known = tuple(known for known in self.known if known != step)
        finally:
            self._going.difference_update(going)
        return going

    async def put_aside(self, step: int) -> Path | None:
        """Move a checkpoint that may not be published out of the way, whole, and give where it is now; None when it is
        served already, and so stays. A publication under way is waited for.
        """
        async with self.publishing:
            if self.steps.routed is not None and step <= self.steps.routed:
                return None
            await self.forget_early()
            aside = self.folder.place_aside(step)
            self.folder.forget_marks(step)
            await asyncio.to_thread(self.ref(step).path.rename, aside)
            return aside

    async def discard(self, step: int) -> None:
        """Delete what a cancelled step may have left of itself. A step that is served stays."""
        async with self.publishing:
            await self.forget_early()
            if (self.steps.routed is None or step > self.steps.routed) and self.ref(step).path.exists():
                await asyncio.to_thread(self._remove, step)

    @contextmanager
    def used_for_training(self, steps: set[int]) -> Iterator[None]:
        """Keep these steps from being deleted."""
        self.training_from |= steps
        try:
            yield
        finally:
            self.training_from -= steps

    async def check(self, checkpoint: CheckpointRef) -> None:
        """Publisher: files as the manifest says, shapes, rank, finite values."""
        manifest = await asyncio.to_thread(read_manifest, checkpoint.path, hashes=True)
        early = self._early_of(checkpoint)
        judged = None if early is None else await early.judged()
        if judged is not None and judged.fingerprint == fingerprint(manifest.files):
            return
        await asyncio.to_thread(check_adapter, checkpoint.path, self.base_shapes, max_rank=self.server.max_lora_rank)
        if judged is not None:
            raise CorruptCheckpoint(
                f"the adapter in {checkpoint.path} was changed after its trainer wrote it, while the engine was loading"
                " it. A step's weights are its trainer's; write others as another model's."
            )

    async def load(self, checkpoint: CheckpointRef) -> None:
        """Publisher: have the engine hold it, after making room among idle adapters."""
        early = self._early_of(checkpoint)
        loaded = None if early is None else await early.loaded()
        manifest = await asyncio.to_thread(read_manifest, checkpoint.path)
        async with self.server.adapters_lock:
            if not self.server.holds(checkpoint.adapter_name):
                await self.server.make_room(self)
            if loaded is None:
                folder = await asyncio.to_thread(served_folder, checkpoint, self.base_shapes, self.folder)
            else:
                folder = loaded.folder
                await asyncio.to_thread(link_canary, checkpoint.path, folder)
            await self.server.load(checkpoint.adapter_name, folder, fingerprint(manifest.files))

    async def verify(self, checkpoint: CheckpointRef) -> None:
        """Publisher: the engine answers under its name, and as this checkpoint."""
        early = self._early_of(checkpoint)
        answered = {} if early is None else await early.answered()
        await self.server.verify(checkpoint.adapter_name, checkpoint.path, answered)

    async def route(self, checkpoint: CheckpointRef) -> None:
        """Publisher: new requests go to it."""
        self.steps.add(checkpoint.step)
        self.steps.route(checkpoint.step)
        self.ended.set()

    async def unload(self, checkpoint: CheckpointRef) -> None:
        """Publisher: undo `load`, begun early or not."""
        early = self._early_of(checkpoint)
        if early is not None:
            self._early = None
            await early.stop()
        async with self.server.adapters_lock:
            await self.server.unload(checkpoint.adapter_name)
            await asyncio.to_thread(forget_served_copy, checkpoint, self.folder)

    def _early_of(self, checkpoint: CheckpointRef) -> EarlyLoad | None:
        early = self._early
        return early if early is not None and early.checkpoint == checkpoint else None

    async def _load_on_demand(self, step: int) -> None:
        await self.on_disk()
        if step not in self.published:
            there = ", ".join(map(str, self.published)) or "none"
            raise CheckpointNotFound(f"{self.key}@{step} is not published; steps that can be asked for: {there}.")
        checkpoint = self.ref(step)
        await self.server.ready(ENGINE_BACK_LIMIT_S)
        await self.check(checkpoint)
        try:
            await self.load(checkpoint)
            await self.verify(checkpoint)
        except BaseException:
            await self.unload(checkpoint)
            raise
        self.steps.add(step)

    def _loading_done(self, step: int, task: asyncio.Task[None]) -> None:
        self._loading.pop(step, None)
        if not task.cancelled():
            # Whoever waited has it; when nobody did, nobody needs it.
            task.exception()

    def _remove(self, step: int) -> None:
        self.folder.forget_marks(step)
        # Renamed first: a kill half-way leaves no folder that looks like a checkpoint.
        folder = self.ref(step).path
        doomed = folder.with_name(f".saving-deleted-{folder.name}-{uuid4().hex[:8]}")
        folder.rename(doomed)
        remove_folder(doomed)

    async def remove_not_kept(self) -> list[int]:
        """Delete the steps made with save_checkpoint=False that a later one has replaced, and say which were."""
        routed = self.steps.routed
        there = await self.on_disk()
        doomed = [s for s in there if routed is not None and s < routed and self.folder.not_kept(s).exists()]
        return await self._delete([step for step in doomed if not self._in_use(step)])


def _engine_gone(error: PublicationFailed) -> bool:
    return isinstance(error.__cause__, ProcessFailed | OSError)
