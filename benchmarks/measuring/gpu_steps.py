"""Items for one training engine on a GPU: one step of it gives the loss that transformers and PEFT give in fp32.

Knows the protocol of training engines, and no engine by name. The oracle computes on the CPU.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final

from art_conformance.live_worker import save_start, working
from art_conformance.oracle import oracle_for
from art_conformance.training_data import expected_loss, make_groups
from art_conformance.training_steps import step_job, step_launch
from art_core import installed_plugins
from art_core.errors import UnknownArgument
from art_runtime.environments import engine_for

from .checklist import Item, NotPossible
from .gpu_serving import GpuRun

# How far a step's loss may be from that in fp32. In 4 bits the base is another one, and only an end is asked for.
LIMITS: Final = {"float32": 1e-3, "bfloat16": 0.05}
FOUR_BIT: Final = {"load_in_4bit": True}


def step_items(run: GpuRun, name: str) -> list[Item]:
    """A step in each dtype, with activations recomputed, and with the base in 4 bits."""
    wanted: list[tuple[str, str, dict[str, Any]]] = [
        ("a step's loss against transformers + PEFT, bf16", "bfloat16", {}),
        ("a step's loss against transformers + PEFT, float32", "float32", {}),
        ("the same, activations recomputed, bf16", "bfloat16", {"gradient_checkpointing": True}),
        ("a step with the base in 4 bits", "bfloat16", FOUR_BIT),
    ]
    return [Item(f"training {name}", what, _bound(run, name, dtype, args)) for what, dtype, args in wanted]


def _bound(run: GpuRun, name: str, dtype: str, init_args: dict[str, Any]) -> Callable[[], Awaitable[str]]:
    return lambda: takes_a_step(run, name, dtype, init_args)


async def takes_a_step(run: GpuRun, name: str, dtype: str, init_args: dict[str, Any]) -> str:
    """Train one step from the run's adapter. Raises NotPossible where the engine has no such setting, RuntimeError when
    the loss is another than it should be.
    """
    engine = engine_for(installed_plugins().training_engine(name))
    launch = step_launch(name, run.base_model, flavour=None, dtype=dtype, init_args=init_args)
    launch = replace(launch, devices=tuple(gpu.index for gpu in run.gpus[:1]))
    try:
        engine.launch(launch)
    except UnknownArgument as error:
        raise NotPossible(str(error)) from error
    key = "-".join([name, dtype, *init_args])
    folder = run.folder / f"step-{key}"
    oracle = await asyncio.to_thread(oracle_for, run.base_model)
    start = save_start(folder / "start" / "0000", run.adapter, step=0, base_model=run.base_model)
    groups = await asyncio.to_thread(make_groups, oracle, start, turns=2)
    async with working(engine, launch, run.folder / f"{key}.log") as worker:
        metrics = (await worker.train(step_job(start, groups, folder))).metrics
    loss, gradient = metrics["loss/train"], metrics["loss/grad_norm"]
    if not (math.isfinite(loss) and math.isfinite(gradient) and gradient > 0):
        raise RuntimeError(f"the loss is {loss} and the gradient's norm {gradient}")
    if init_args == FOUR_BIT:
        return f"loss {loss:.4f}, gradient norm {gradient:.4g}"
    exact = await asyncio.to_thread(expected_loss, oracle, start, groups)
    if not abs(loss - exact) <= LIMITS[dtype]:
        raise RuntimeError(f"the loss is {loss:.5f}, and {exact:.5f} by transformers and PEFT")
    return f"loss {loss:.5f}, off by {abs(loss - exact):.1e}; gradient norm {gradient:.4g}"
