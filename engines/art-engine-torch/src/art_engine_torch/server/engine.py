"""The thread that owns the model: it takes commands between steps and steps while there is something to do.

Everything that touches tensors runs here; the HTTP side posts commands and is called back. Knows no HTTP.
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from .generation import GenerationRequest
from .lora_batch import LoraAdapter
from .lora_files import AdapterRefused, read_adapter
from .scheduler import Scheduler

logger = logging.getLogger(__name__)
T = TypeVar("T")
# So many in a row, and the engine ends.
FAILED_STEPS: Final = 3


class EngineStopped(RuntimeError):
    """The engine's thread has ended; nothing can be asked of it any more."""


class UnknownAdapter(KeyError):
    """No adapter of that name is loaded."""


class InferenceEngineThread:
    """Runs a scheduler in a thread of its own. `build` makes it there, so that loading weights blocks nobody else.

    `on_failure` is called, in that thread, when building or a step raised: the engine is then at its end.
    """

    def __init__(
        self,
        build: Callable[[], Scheduler],
        *,
        served_name: str,
        max_adapters: int,
        max_lora_rank: int,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._build = build
        self._served_name = served_name
        self._max_adapters = max_adapters
        self._max_lora_rank = max_lora_rank
        self._on_failure = on_failure
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._adapters: dict[str, LoraAdapter] = {}
        self._adapters_lock = threading.Lock()
        self._scheduler: Scheduler | None = None
        self._paused = False
        self._home: torch.device | None = None
        self._stopping = False
        self._failure: BaseException | None = None
        self._end_reason: str | None = None
        self._failed_steps = 0
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="art-torch-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread; `ready` turns true when the model is loaded."""
        self._thread.start()

    def request_stop(self) -> None:
        """Ends the thread after the step under way; unfinished requests end with an error. Safe in a signal handler."""
        self._stopping = True
        self._commands.put(lambda: None)

    def stop(self, timeout_s: float) -> None:
        """Like `request_stop`, and waits for it."""
        self.request_stop()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    @property
    def ready(self) -> bool:
        """Whether requests can be answered."""
        return self._scheduler is not None and self._failure is None and not self._stopping

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler, for its sizes and counters. Raises EngineStopped before it is there and after a failure."""
        if self._scheduler is None or self._failure is not None:
            raise EngineStopped(f"the engine is not running: {self._failure or 'the model is still loading'}")
        return self._scheduler

    @property
    def paused(self) -> bool:
        """Whether generation is held."""
        return self._paused

    @property
    def asleep(self) -> bool:
        """Whether the device's memory was given back."""
        return self._home is not None

    def adapter_names(self) -> list[str]:
        """The loaded adapters."""
        return list(self._adapters)

    def adapter(self, name: str) -> LoraAdapter:
        """Raises UnknownAdapter."""
        try:
            return self._adapters[name]
        except KeyError:
            raise UnknownAdapter(name) from None

    def load_adapter(self, name: str, folder: Path) -> LoraAdapter:
        """Reads and checks an adapter in the caller's thread; generation goes on meanwhile. Raises AdapterRefused."""
        scheduler = self.scheduler
        decoder = scheduler.decoder
        self._check_name(name)
        adapter = read_adapter(
            name,
            folder,
            layers=decoder.shape.layers,
            widths=decoder.shape.module_widths(),
            max_rank=self._max_lora_rank,
            device=self._home or decoder.device,
            dtype=decoder.dtype,
        )
        with self._adapters_lock:
            self._check_name(name)
            self._put(lambda: scheduler.adapter_loaded(adapter.uid))
            self._adapters[name] = adapter
        return adapter

    def unload_adapter(self, name: str) -> None:
        """No new request can name it; those under way end on it. Raises UnknownAdapter."""
        with self._adapters_lock:
            adapter = self.adapter(name)
            del self._adapters[name]
        scheduler = self.scheduler
        self._put(lambda: scheduler.adapter_unloaded(adapter.uid))

    def submit(self, request: GenerationRequest) -> None:
        """Queues a request; its listener hears the rest."""
        scheduler = self.scheduler

        def add() -> None:
            try:
                scheduler.add(request)
            except Exception as error:  # what one request brought along must not end the others
                logger.exception("A request could not be queued.")
                request.fail(f"{type(error).__name__}: {error}")

        self._put(add)

    def cancel(self, request: GenerationRequest) -> None:
        """Stops what is left of a request."""
        if self._scheduler is not None:
            self._put(functools.partial(self._scheduler.remove, request))

    def pause(self, *, abort: bool) -> Future[None]:
        """Holds generation after the step under way; with `abort`, running and waiting requests end now."""

        def do() -> None:
            self._paused = True
            if abort:
                self.scheduler.abort_all()

        return self.call(do)

    def resume(self) -> Future[None]:
        """Goes on. Has no effect on a sleeping engine, which must be woken first."""

        def do() -> None:
            self._paused = self.asleep

        return self.call(do)

    def sleep(self) -> Future[None]:
        """Pauses, gives cache memory back and moves the weights off the device; wake goes on where it was."""

        def do() -> None:
            decoder = self.scheduler.decoder
            self._paused = True
            self.scheduler.release_memory()
            if self._home is None:
                self._home = decoder.device
                decoder.move(torch.device("cpu"))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

        return self.call(do)

    def wake(self) -> Future[None]:
        """Takes the memory again and goes on."""

        def do() -> None:
            if self._home is not None:
                self.scheduler.decoder.move(self._home)
                self._home = None
            self._paused = False

        return self.call(do)

    def call(self, do: Callable[[], T]) -> Future[T]:
        """Runs `do` in the engine's thread between two steps."""
        future: Future[T] = Future()

        def command() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(do())
                except Exception as error:
                    future.set_exception(error)

        if self._stopping or self._failure is not None:
            future.set_exception(EngineStopped(f"the engine is not running: {self._failure or 'it is stopping'}"))
        else:
            self._put(command)
        return future

    def statistics(self) -> dict[str, Any]:
        """Counters and what is running now."""
        scheduler = self.scheduler
        return {
            "running": scheduler.running,
            "waiting": scheduler.waiting,
            "paused": self._paused,
            "asleep": self.asleep,
            "adapters": len(self._adapters),
            "prefix_cache_bytes": scheduler.prefix_bytes,
            **asdict(scheduler.counters),
        }

    def _check_name(self, name: str) -> None:
        if name == self._served_name:
            raise AdapterRefused(f"{name!r} is the base model's own name; give the adapter another.")
        if name in self._adapters:
            raise AdapterRefused(
                f"An adapter named {name!r} is already loaded, from {self._adapters[name].path}. "
                "Other weights need another name, so that nothing is answered under a name that it isn't."
            )
        if len(self._adapters) >= self._max_adapters:
            raise AdapterRefused(
                f"All {self._max_adapters} places for adapters are taken ({', '.join(self._adapters)}); "
                "unload one first, or start the server with more (--max-adapters)."
            )

    def _run(self) -> None:
        reason = "the server is stopping"
        try:
            with torch.inference_mode():
                self._scheduler = self._build()
                while not self._stopping:
                    self._take_commands()
                    if self._paused or not self._step(self._scheduler):
                        self._commands.get()()  # nothing to do until something is asked
        except BaseException as error:
            logger.exception("The engine failed.")
            self._failure = error
            reason = _failed(error)
            self._on_failure(error)
        finally:
            self._end_reason = reason
            self._end()

    def _step(self, scheduler: Scheduler) -> bool:
        """A step. One that fails ends the requests that it was for and, unless the device is at its end or none
        succeeds any more, nothing else.
        """
        try:
            worked = scheduler.step()
        except Exception as error:
            self._failed_steps += 1
            if self._failed_steps == FAILED_STEPS:
                raise
            logger.exception("A step failed; the requests under way end with it.")
            scheduler.start_over(_failed(error))
            return True
        if worked:
            self._failed_steps = 0
        return worked

    def _put(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        if self._end_reason is not None:
            self._end()

    def _end(self) -> None:
        """Tells whoever still waits that the end has come, also those who asked too late for the thread to see."""
        with self._ending:
            self._take_commands()
            if self._scheduler is not None:
                self._scheduler.fail_all(self._end_reason or "the server is stopping")

    def _take_commands(self) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command()


def _failed(error: BaseException) -> str:
    return f"the engine failed: {type(error).__name__}: {error}"
