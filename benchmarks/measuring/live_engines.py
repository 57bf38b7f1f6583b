"""Starts an installed inference engine for a benchmark, as a backend would: its launch plan, run and waited for.

Knows cards, environments and processes; knows no engine by name and measures nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from art_conformance.serving import LiveEngine, Sample, samples
from art_core import InferenceEngine, InferenceLaunch, installed_plugins, resolve_base_model
from art_runtime import StartProgress, SupervisedProcess, accelerators, free_port
from art_runtime.environments import engine_for, python_for

DEFAULT_MODEL = "smollm2-135m-instruct"
REQUEST_LIMIT_S = 1800.0


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How an engine is started. `dtype` None is the same for every engine: float32 on a CPU, bfloat16 on a GPU.

    `max_model_len` is in tokens. `auto_install` makes the engine's environment when it isn't there.
    """

    base_model: Path
    log_folder: Path
    dtype: str | None = None
    max_adapters: int = 4
    max_model_len: int | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    auto_install: bool = False
    api_key: str = field(default_factory=lambda: f"art-{secrets.token_urlsafe(24)}", repr=False)

    @property
    def chosen_dtype(self) -> str:
        """The one that engines are started with."""
        return self.dtype or ("bfloat16" if accelerators() else "float32")


async def base_model_folder(name: str) -> Path:
    """The folder of weights for a name, as backends find it. Raises BaseModelNotFound."""
    return await resolve_base_model(installed_plugins(), name)


@asynccontextmanager
async def running(name: str, settings: EngineSettings, console: Console) -> AsyncIterator[LiveEngine]:
    """Run the installed engine `name` until the block is left; shows how long its start takes.

    Raises PluginError for an engine that isn't installed, EnvironmentMissing with the command that makes its
    environment, ProcessFailed with the end of its log.
    """
    spec = installed_plugins().inference_engine(name)
    engine: InferenceEngine = engine_for(spec)
    launch = InferenceLaunch(
        base_model=settings.base_model,
        served_name="base-model",
        host="127.0.0.1",
        port=free_port(),
        api_key=settings.api_key,
        python=python_for(spec, auto_install=settings.auto_install),
        max_adapters=settings.max_adapters,
        max_model_len=settings.max_model_len,
        dtype=settings.chosen_dtype,
        devices=(accelerators()[0].index,) if accelerators() else (),
        engine_args=settings.engine_args,
    )
    with console.status(f"starting {name}") as status:

        def show(progress: StartProgress) -> None:
            status.update(f"starting {name}, {progress.seconds:.0f} s")

        process = await SupervisedProcess.start(
            engine.launch(launch),
            port=launch.port,
            log_file=settings.log_folder / f"{name}.log",
            name=f"inference engine {name}",
            on_progress=show,
        )
    client = httpx.AsyncClient(
        base_url=process.base_url,
        headers={"Authorization": f"Bearer {launch.api_key}"},
        limits=httpx.Limits(max_connections=None),
        timeout=REQUEST_LIMIT_S,
        trust_env=False,
    )
    live = LiveEngine(engine, launch, process, client)
    try:
        yield live
    finally:
        await live.close()


async def chat(live: LiveEngine, adapter: str, body: dict[str, Any]) -> list[Sample]:
    """Ask for a chat completion as an adapter, and give its choices; waits longer than a check would.

    Raises RuntimeError for an answer that isn't 200.
    """
    prepared = live.engine.prepare_request("chat/completions", {"model": live.launch.served_name, **body}, adapter)
    answer = await live.client.post("/v1/chat/completions", json=prepared, timeout=REQUEST_LIMIT_S)
    if answer.status_code != 200:
        raise RuntimeError(f"{live.engine.name} answered HTTP {answer.status_code}: {answer.text[:1000]}")
    return samples(live.engine.read_response("chat/completions", answer.json()))
