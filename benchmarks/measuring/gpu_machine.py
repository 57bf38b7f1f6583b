"""What is known before an engine is started: the GPUs, their driver, what they can compute, and what is installed.

Asks the driver's tool and the engines' own probes.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Awaitable, Callable

from art_core import installed_plugins
from art_runtime import Accelerator
from art_runtime.environments import EngineSpec, EnvironmentMissing, locate
from art_runtime.environments.doctor import examine

from .checklist import Item, NotPossible

QUERY_LIMIT_S = 60.0


def query(gpu: Accelerator, what: str) -> str:
    """One of the driver's figures for a GPU, such as "driver_version". Raises RuntimeError when it doesn't answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        raise RuntimeError("nvidia-smi is not there any more")
    command = [tool, f"--query-gpu={what}", "--format=csv,noheader,nounits", "-i", gpu.uuid]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_LIMIT_S)
    if answer.returncode != 0:
        raise RuntimeError(f"nvidia-smi says: {answer.stdout.strip()} {answer.stderr.strip()}")
    return answer.stdout.strip()


async def memory_used(gpu: Accelerator) -> int:
    """The GPU's memory in use by anyone, in MiB."""
    return int(await asyncio.to_thread(query, gpu, "memory.used"))


def capability(gpu: Accelerator) -> float:
    """Its compute capability, such as 9.0."""
    return float(query(gpu, "compute_cap"))


def engine_cards() -> dict[str, EngineSpec]:
    """Every installed engine by what it is: "inference torch", "training torch"."""
    registry = installed_plugins()
    inference = {f"inference {name}": registry.inference_engine(name) for name in registry.provided("inference engine")}
    training = {f"training {name}": registry.training_engine(name) for name in registry.provided("training engine")}
    return {**inference, **training}


def is_ready(spec: EngineSpec) -> bool:
    """True when the engine has an interpreter to run in."""
    try:
        locate(spec)
    except EnvironmentMissing:
        return False
    return True


def machine_items(gpus: tuple[Accelerator, ...]) -> list[Item]:
    """The GPUs, and every installed engine's environment."""
    items = [Item(f"GPU {gpu.index}", "device and driver", _device(gpu)) for gpu in gpus]
    items += [Item(about, "art engines doctor", _doctor(spec)) for about, spec in engine_cards().items()]
    return items


def _device(gpu: Accelerator) -> Callable[[], Awaitable[str]]:
    async def check() -> str:
        driver, computes = await asyncio.gather(
            asyncio.to_thread(query, gpu, "driver_version"), asyncio.to_thread(capability, gpu)
        )
        return (
            f"{gpu.name}, {gpu.memory_mib / 1024:.0f} GiB, driver {driver}, compute capability {computes}, bf16"
            f" {'yes' if computes >= 8.0 else 'no'}, FP8 {'yes' if computes >= 8.9 else 'no'}"
        )

    return check


def _doctor(spec: EngineSpec) -> Callable[[], Awaitable[str]]:
    async def check() -> str:
        try:
            found = await asyncio.to_thread(examine, spec)
        except EnvironmentMissing as error:
            raise NotPossible(str(error)) from error
        if found.problem:
            raise RuntimeError(found.problem)
        return ", ".join(f"{name} {version}" for name, version in found.versions.items())

    return check
