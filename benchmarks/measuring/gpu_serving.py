"""Items for one inference engine on a GPU: it starts, serves an adapter as its weights are, sleeps, computes in FP8.

Knows the protocol of engines, and of engines by name only how they are asked for FP8. The oracle is transformers and
PEFT in fp32 on the CPU.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from art_conformance.oracle import Agreement, agreement, oracle_for
from art_conformance.serving import LiveEngine
from art_core import InferenceCapability
from art_runtime import Accelerator

from .checklist import Item, NotPossible
from .gpu_machine import capability, memory_used
from .live_engines import EngineSettings, chat, running

ADAPTER: Final = "gpu-check/agent@1"
# What turns weights and products into FP8 when the base model is loaded; the adapter stays as it is.
FP8: Final[Mapping[str, Mapping[str, Any]]] = {"vllm": {"quantization": "fp8"}, "sglang": {"quantization": "fp8"}}
FP8_CAPABILITY: Final = 8.9
# The mean absolute difference of logprobs to fp32 that a sound engine stays below, in nats.
LIMITS: Final = {"float32": 0.05, "bfloat16": 0.1, "fp8": 0.25}


@dataclass
class GpuRun:
    """What the items of one run share. `adapter` is a PEFT folder; `live` holds the servers that run now."""

    gpus: tuple[Accelerator, ...]
    base_model: Path
    adapter: Path
    folder: Path
    console: Console
    live: dict[str, LiveEngine] = field(default_factory=dict)
    memory_before: dict[str, int] = field(default_factory=dict)
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    @property
    def settings(self) -> EngineSettings:
        """How engines are started: bf16, logs in a folder of the run."""
        return EngineSettings(base_model=self.base_model, log_folder=self.folder, dtype="bfloat16")

    def running(self, name: str) -> LiveEngine:
        """The server of an engine. Raises NotPossible when it didn't start."""
        if name not in self.live:
            raise NotPossible("the server didn't start")
        return self.live[name]


Check = Callable[[GpuRun, str], Awaitable[str]]


def serving_items(run: GpuRun, name: str) -> list[Item]:
    """The items of one engine, in the order that they need each other."""
    checks: list[tuple[str, Check]] = [
        ("starts on the GPU, bf16", starts),
        ("serves an adapter", serves_an_adapter),
        ("logprobs against transformers + PEFT, bf16", logprobs),
        ("pauses, sleeps and wakes", sleeps_and_wakes),
        ("stops and gives the GPU back", stops),
        ("logprobs against transformers + PEFT, float32", logprobs_in_float32),
        ("FP8", computes_in_fp8),
    ]
    return [Item(f"inference {name}", what, _bound(check, run, name)) for what, check in checks]


def _bound(check: Check, run: GpuRun, name: str) -> Callable[[], Awaitable[str]]:
    return lambda: check(run, name)


async def starts(run: GpuRun, name: str) -> str:
    """Its server runs, and holds memory of the GPU."""
    run.memory_before[name] = before = await memory_used(run.gpus[0])
    run.live[name] = await run.stack.enter_async_context(running(name, run.settings, run.console))
    used = await memory_used(run.gpus[0]) - before
    if used < 100:
        raise RuntimeError(f"it runs, but holds only {used} MiB of the GPU's memory: it computes elsewhere")
    return f"{used / 1024:.1f} GiB of the GPU"


async def serves_an_adapter(run: GpuRun, name: str) -> str:
    """An adapter is loaded, listed, and answers with ids and logprobs."""
    live = run.running(name)
    await live.load(ADAPTER, run.adapter)
    if ADAPTER not in await live.adapters():
        raise RuntimeError("the server says yes to the adapter and doesn't list it")
    [sample] = await chat(live, ADAPTER, _question(16))
    if len(sample.ids) != 16:
        raise RuntimeError(f"16 tokens were asked for, and {len(sample.ids)} came")
    return "loaded, listed, answers"


async def logprobs(run: GpuRun, name: str) -> str:
    """What it says of sampled tokens is what the weights say."""
    return await _agrees(run, run.running(name), "bfloat16")


async def sleeps_and_wakes(run: GpuRun, name: str) -> str:
    """Pause and resume, sleep and wake, as far as it declares them; it answers as before afterwards."""
    live, declared = run.running(name), run.running(name).engine.capabilities
    said = []
    if InferenceCapability.PAUSE in declared:
        await live.control(live.engine.pause())
        await live.control(live.engine.resume())
        said.append("pauses and resumes")
    if InferenceCapability.SLEEP in declared:
        awake = await memory_used(run.gpus[0])
        await live.control(live.engine.sleep())
        asleep = await memory_used(run.gpus[0])
        await live.control(live.engine.wake())
        if asleep >= awake:
            raise RuntimeError(f"asleep it holds {asleep} MiB of the GPU, awake {awake} MiB: nothing was given back")
        said.append(f"gives {(awake - asleep) / 1024:.1f} GiB back asleep")
    if not said:
        raise NotPossible("it declares neither pause nor sleep")
    return "; ".join([*said, f"afterwards {await _agrees(run, live, 'bfloat16')}"])


async def stops(run: GpuRun, name: str) -> str:
    """It ends, and what it held of the GPU is free again."""
    live = run.running(name)
    del run.live[name]
    await run.stack.aclose()
    left = await memory_used(run.gpus[0]) - run.memory_before[name]
    if live.process.running or left > 1024:
        raise RuntimeError(f"after its end {left} MiB of the GPU's memory are still held")
    return "ended"


async def logprobs_in_float32(run: GpuRun, name: str) -> str:
    """The same in float32, where only mistakes make a difference."""
    async with _with_adapter(run, name, replace(run.settings, dtype="float32")) as live:
        return await _agrees(run, live, "float32")


async def computes_in_fp8(run: GpuRun, name: str) -> str:
    """The base model in FP8, the adapter beside it."""
    computes = capability(run.gpus[0])
    if computes < FP8_CAPABILITY:
        raise NotPossible(f"the GPU's compute capability is {computes}; FP8 needs {FP8_CAPABILITY}")
    if name not in FP8:
        raise NotPossible(f"engine {name} has no FP8 that this check knows of")
    async with _with_adapter(run, name, replace(run.settings, engine_args=FP8[name])) as live:
        return await _agrees(run, live, "fp8")


@asynccontextmanager
async def _with_adapter(run: GpuRun, name: str, settings: EngineSettings) -> AsyncIterator[LiveEngine]:
    async with running(name, settings, run.console) as live:
        await live.load(ADAPTER, run.adapter)
        yield live


def _question(tokens: int, n: int = 1) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Say something about the city."}]
    return {"messages": messages, "max_tokens": tokens, "n": n, "temperature": 1.0, "ignore_eos": True}


async def _agrees(run: GpuRun, live: LiveEngine, precision: str) -> str:
    """How the logprobs of samples agree with the oracle's. Raises RuntimeError beyond the limit, or when the base model
    explains them better than the adapter.
    """
    found = await chat(live, ADAPTER, _question(64, n=4))
    judged: dict[Path | None, Agreement] = {}
    for adapter in (run.adapter, None):
        said, true = [], []
        for sample in found:
            said += sample.logprobs
            true += oracle_for(run.base_model).logprobs(sample.prompt_ids, sample.ids, adapter).tolist()
        judged[adapter] = agreement(said, true)
    mine, base = judged[run.adapter], judged[None]
    if mine.mean > LIMITS[precision] or base.mean <= mine.mean:
        raise RuntimeError(f"{mine}, limit {LIMITS[precision]}; against the base model: {base}")
    return str(mine)
