"""The torch engine's inference server with one fault, each for one check of a running server to notice.

Run as a script, with the name of the fault before the server's own arguments. It knows the server's insides, which it
changes before the server starts, and none of the checks.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

from starlette.requests import Request
from starlette.responses import Response

from art_engine_torch.names import API_KEY_VARIABLE
from art_engine_torch.server import __main__ as process
from art_engine_torch.server import completions
from art_engine_torch.server.api_answers import AnswerForm
from art_engine_torch.server.api_bodies import read_body
from art_engine_torch.server.api_errors import ApiError
from art_engine_torch.server.app import InferenceApp
from art_engine_torch.server.completions import CompletionHandlers
from art_engine_torch.server.engine import InferenceEngineThread
from art_engine_torch.server.generation import GenerationRequest, Sequence
from art_engine_torch.server.lora_batch import LoraAdapter
from art_engine_torch.server.lora_files import AdapterMissing, AdapterRefused

JSON = dict[str, Any]
# More whole answers at once than any check asks for that isn't about a batch of adapters.
CROWD = 5


def unwell_with_adapters() -> None:
    """The health path answers 200 at first and no more once an adapter is loaded."""
    sound = InferenceApp._health

    async def health(self: InferenceApp, request: Request) -> Response:
        return Response(status_code=503) if self._engine.adapter_names() else await sound(self, request)

    patch.object(InferenceApp, "_health", health).start()


def asks_for_no_key() -> None:
    """Everyone is let in."""
    patch.object(InferenceApp, "_check_key", lambda self, request: None).start()


def mixes_adapters_up() -> None:
    """In a crowd, every adapter is answered by the one that was asked first."""

    def instead(adapter: LoraAdapter | None, under_way: list[LoraAdapter | None]) -> LoraAdapter | None:
        adapters = [other for other in under_way if other is not None]
        return adapters[0] if adapter is not None and len(under_way) > CROWD else adapter

    _replacing_adapters(instead)


def base_goes_with_an_adapter() -> None:
    """While an adapter is answering, it answers for the base model too."""

    def instead(adapter: LoraAdapter | None, under_way: list[LoraAdapter | None]) -> LoraAdapter | None:
        adapters = [other for other in under_way if other is not None]
        return adapters[0] if adapter is None and adapters else adapter

    _replacing_adapters(instead)


def _replacing_adapters(
    instead: Callable[[LoraAdapter | None, list[LoraAdapter | None]], LoraAdapter | None],
) -> None:
    """Whole answers are of the adapter that `instead(asked, under way)` says."""
    sound = CompletionHandlers._generate
    under_way: list[LoraAdapter | None] = []

    async def generate(
        self: CompletionHandlers,
        request: Request,
        asked: Any,
        kind: Any,
        prompts: Any,
        adapter: LoraAdapter | None,
        *limits: Any,
    ) -> Response:
        if asked.stream:
            return await sound(self, request, asked, kind, prompts, adapter, *limits)
        under_way.append(adapter)
        try:
            return await sound(self, request, asked, kind, prompts, instead(adapter, under_way), *limits)
        finally:
            under_way.remove(adapter)

    patch.object(CompletionHandlers, "_generate", generate).start()


def scales_logprobs() -> None:
    """Logprobs are those of the distribution that was sampled from, under its temperature."""
    sound = Sequence.accept

    def accept(self: Sequence, token: int, logprob: float, top: Any) -> bool:
        return sound(self, token, logprob / (self.settings.temperature or 1.0), top)

    patch.object(Sequence, "accept", accept).start()


def _changing_bodies(change: Callable[[JSON], JSON]) -> None:
    """Requests for answers are read as `change` makes them."""

    async def read(request: Request, *, optional: bool = False) -> JSON:
        return change(await read_body(request, optional=optional))

    patch.object(completions, "read_body", read).start()


def ignores_seeds() -> None:
    """Every sample has a seed of its own."""
    _changing_bodies(lambda body: {key: value for key, value in body.items() if key != "seed"})


def ignores_stops() -> None:
    """Stop strings end nothing."""
    _changing_bodies(lambda body: {key: value for key, value in body.items() if key != "stop"})


def says_one_token_more() -> None:
    """An answer may be longer than max_tokens by one."""
    _changing_bodies(lambda body: {**body, "max_tokens": body["max_tokens"] + 1} if "max_tokens" in body else body)


def says_one_token() -> None:
    """Every answer is over at once."""
    _changing_bodies(lambda body: {**body, "max_tokens": 1})


def samples_at_temperature_zero() -> None:
    """Temperature 0 gives the same answer each time, and not the likeliest."""
    _changing_bodies(lambda body: {**body, "temperature": 1.0, "seed": 1} if body.get("temperature") == 0 else body)


def begins_prompts_by_itself() -> None:
    """A token goes before every prompt of token ids."""
    _changing_bodies(lambda body: {**body, "prompt": [1, *body["prompt"]]} if "prompt" in body else body)


def mends_requests() -> None:
    """A number that is out of its range is taken as the nearest one that isn't."""
    lowest = {"n": 1, "max_tokens": 1, "temperature": 0.0}
    _changing_bodies(
        lambda body: {key: max(value, lowest[key]) if key in lowest else value for key, value in body.items()}
    )


def cuts_prompts() -> None:
    """Of a prompt that is too long, the end is taken."""
    sound = CompletionHandlers._known

    def known(self: CompletionHandlers, ids: list[int]) -> Any:
        return sound(self, ids[-self._engine.scheduler.limits.max_len // 2 :])

    patch.object(CompletionHandlers, "_known", known).start()


def streams_one_choice_without_ids() -> None:
    """A stream of several choices has token ids and one of a single choice has none."""
    sound = CompletionHandlers._form

    def form(self: CompletionHandlers, asked: Any, *rest: Any, **more: Any) -> Any:
        single = asked.stream and asked.n == 1
        return sound(self, asked.model_copy(update={"return_token_ids": False}) if single else asked, *rest, **more)

    patch.object(CompletionHandlers, "_form", form).start()


def base_answers_for_never_loaded() -> None:
    """The base model answers under a name that was never given to an adapter."""
    _base_answers(lambda name, once_loaded: name not in once_loaded)


def base_answers_for_unloaded() -> None:
    """The base model answers under the name of an adapter that was unloaded."""
    _base_answers(lambda name, once_loaded: name in once_loaded)


def _base_answers(answers: Callable[[str, set[str]], bool]) -> None:
    sound_load, sound_adapter = InferenceEngineThread.load_adapter, CompletionHandlers._adapter
    once_loaded: set[str] = set()

    def load(self: InferenceEngineThread, name: str, folder: Path) -> LoraAdapter:
        loaded = sound_load(self, name, folder)
        once_loaded.add(name)
        return loaded

    def adapter(self: CompletionHandlers, model: str) -> LoraAdapter | None:
        try:
            return sound_adapter(self, model)
        except ApiError:
            if answers(model, once_loaded):
                return None
            raise

    patch.object(InferenceEngineThread, "load_adapter", load).start()
    patch.object(CompletionHandlers, "_adapter", adapter).start()


def takes_missing_adapters() -> None:
    """Loading a folder in which there is no adapter is answered as a success."""
    sound = InferenceEngineThread.load_adapter

    def load(self: InferenceEngineThread, name: str, folder: Path) -> Any:
        try:
            return sound(self, name, folder)
        except AdapterMissing:
            return None

    patch.object(InferenceEngineThread, "load_adapter", load).start()


def replaces_weights() -> None:
    """A name that is loaded again has the other weights from then on."""
    sound = InferenceEngineThread.load_adapter

    def load(self: InferenceEngineThread, name: str, folder: Path) -> LoraAdapter:
        if name in self.adapter_names():
            self.unload_adapter(name)
        return sound(self, name, folder)

    patch.object(InferenceEngineThread, "load_adapter", load).start()


def unloading_ends_streams() -> None:
    """Streams of an adapter end when it is unloaded, with what they have."""
    sound_submit, sound_unload = InferenceEngineThread.submit, InferenceEngineThread.unload_adapter
    streams: list[GenerationRequest] = []

    def submit(self: InferenceEngineThread, request: GenerationRequest) -> None:
        if request.streaming:
            streams.append(request)
        sound_submit(self, request)

    def unload(self: InferenceEngineThread, name: str) -> None:
        unloaded = self.adapter(name)
        sound_unload(self, name)
        for stream in streams:
            if stream.adapter is unloaded:
                self.cancel(stream)

    patch.object(InferenceEngineThread, "submit", submit).start()
    patch.object(InferenceEngineThread, "unload_adapter", unload).start()


def loses_places_under_load() -> None:
    """Adapters that are unloaded while something is answered leave their places taken, but for the first six."""
    sound = InferenceEngineThread.unload_adapter
    numbers = itertools.count()

    def unload(self: InferenceEngineThread, name: str) -> None:
        sound(self, name)
        if (self.scheduler.running or self.scheduler.waiting) and next(numbers) >= 6:
            self._max_adapters -= 1

    patch.object(InferenceEngineThread, "unload_adapter", unload).start()


def leaving_ends_everything() -> None:
    """When a client goes away, all answers end, with what they have."""

    def cancel(self: InferenceEngineThread, _: GenerationRequest) -> None:
        self.call(self.scheduler.abort_all)

    patch.object(InferenceEngineThread, "cancel", cancel).start()


def forgets_adapters_in_sleep() -> None:
    """No adapter is there after waking."""
    sound = InferenceEngineThread.sleep

    def sleep(self: InferenceEngineThread) -> Future[None]:
        for name in self.adapter_names():
            self.unload_adapter(name)
        return sound(self)

    patch.object(InferenceEngineThread, "sleep", sleep).start()


def says_when_in_words() -> None:
    """The time of an answer is a string."""
    _changing_answers(lambda answer: {**answer, "created": str(answer["created"])})


def gives_each_chunk_an_id() -> None:
    """No two answers and no two chunks have the same id."""
    numbers = itertools.count()
    _changing_answers(lambda answer: {**answer, "id": f"{answer['id']}-{next(numbers)}"})


def _changing_answers(change: Callable[[JSON], JSON]) -> None:
    """What answers and chunks have beside their choices is as `change` makes it."""
    sound = AnswerForm.envelope

    def envelope(self: AnswerForm, *, chunk: bool) -> JSON:
        return change(sound(self, chunk=chunk))

    patch.object(AnswerForm, "envelope", envelope).start()


def forgets_what_is_loaded_again() -> None:
    """An adapter that is loaded a second time, from where it came, is gone."""
    sound = InferenceEngineThread.load_adapter

    def load(self: InferenceEngineThread, name: str, folder: Path) -> LoraAdapter:
        if name in self.adapter_names() and Path(self.adapter(name).path) == folder:
            self.unload_adapter(name)
            raise AdapterRefused(f"An adapter named {name!r} was already loaded.")
        return sound(self, name, folder)

    patch.object(InferenceEngineThread, "load_adapter", load).start()


def cuts_long_names() -> None:
    """An adapter is known by the first 255 characters of its name."""
    sound = InferenceEngineThread.load_adapter

    def load(self: InferenceEngineThread, name: str, folder: Path) -> LoraAdapter:
        return sound(self, name[:255], folder)

    patch.object(InferenceEngineThread, "load_adapter", load).start()


def mixes_loads_up() -> None:
    """Of adapters that are loaded at once, each gets the weights of the first."""
    sound = InferenceEngineThread.load_adapter
    under_way: list[Path] = []

    def load(self: InferenceEngineThread, name: str, folder: Path) -> LoraAdapter:
        under_way.append(folder)
        first = under_way[0]
        time.sleep(0.1)  # whoever asks at once has asked by then
        try:
            return sound(self, name, first)
        finally:
            under_way.remove(folder)

    patch.object(InferenceEngineThread, "load_adapter", load).start()


def logs_its_key() -> None:
    """The key is in the log's first line."""
    print(f"serving with the key {os.environ[API_KEY_VARIABLE]}", flush=True)


def ignores_sigterm() -> None:
    """SIGTERM changes nothing."""
    sound = process._Server.handle_exit

    def handle_exit(self: process._Server, sig: int, frame: FrameType | None) -> None:
        if sig != signal.SIGTERM:
            sound(self, sig, frame)

    patch.object(process._Server, "handle_exit", handle_exit).start()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    sys.exit(process.main(sys.argv[2:]))
