"""Tries everything that needs a CUDA GPU, with what is installed on this machine, and prints a table.

    make gpu-check
    python benchmarks/gpu_check.py --only vllm

For every GPU its driver; for every installed engine its environment (`art engines doctor`). For every inference engine
that has one: it starts on the GPU, serves an adapter, gives the logprobs of its weights (against transformers and PEFT,
in bf16, fp32 and FP8), pauses, sleeps and wakes as it declares, and gives the GPU back. For every training engine that
has one: a step's loss (against transformers and PEFT, in bf16 and fp32, with activations recomputed), and a base in 4
bits. For every pair of them: steps are trained and published while rollouts run, in shared mode on one GPU and in
dedicated mode on two.
A row says ok, failed (and why), or not possible here (and why). Exits with 1 when something failed, and with 2 on a
machine without a CUDA GPU, where there is nothing to check. Needs an hour at most, usually much less.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from measuring.checklist import Item, Row, exit_code, table_of, try_all
from measuring.gpu_machine import engine_cards, is_ready, machine_items
from measuring.gpu_serving import GpuRun, serving_items
from measuring.gpu_steps import step_items
from measuring.gpu_training import training_items
from measuring.live_engines import DEFAULT_MODEL, base_model_folder
from measuring.machine import machine
from rich.console import Console

from art_conformance.tiny_model import write_adapter, write_base_model
from art_runtime import Accelerator, accelerators

NO_GPU = "This machine has no CUDA GPU that this process may use (nvidia-smi lists none), so nothing was checked."
NO_GPU_EXIT = 2


def items_for(run: GpuRun) -> list[Item]:
    """Every row, in order: the machine, each engine that is ready, each pair of engines that are."""
    ready = [about.split() for about, spec in engine_cards().items() if is_ready(spec)]
    inference = [name for kind, name in ready if kind == "inference"]
    training = [name for kind, name in ready if kind == "training"]
    items = machine_items(run.gpus)
    for name in inference:
        items += serving_items(run, name)
    for name in training:
        items += step_items(run, name)
    for one in inference:
        for other in training:
            items += training_items(run, one, other)
    return items


async def check(arguments: argparse.Namespace, gpus: tuple[Accelerator, ...], console: Console) -> list[Row]:
    """Try every item that is asked for."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.tiny:
            base = write_base_model(folder / "tiny")
        else:
            base = await base_model_folder(arguments.base_model)
        adapter = write_adapter(folder / "adapter", base, seed=1, strength=0.3)
        run = GpuRun(gpus=gpus, base_model=base, adapter=adapter, folder=folder, console=console)
        wanted = [item for item in items_for(run) if arguments.only in f"{item.about}: {item.what}"]
        try:
            return await try_all(wanted, console)
        finally:
            await run.stack.aclose()


def main(given: Sequence[str] | None = None) -> int:
    """Check and print; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only rows whose text holds this, such as vllm or 'shared mode'")
    parser.add_argument("--base-model", default=DEFAULT_MODEL, help="a name, a folder, or a hub name")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model instead")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    arguments = parser.parse_args(given)
    gpus = accelerators()
    if not gpus:
        print(NO_GPU)
        return NO_GPU_EXIT
    rows = asyncio.run(check(arguments, gpus, Console(stderr=True)))
    if arguments.json:
        content = [
            {
                "about": row.item.about,
                "what": row.item.what,
                "outcome": row.outcome.value,
                "said": row.said,
                "seconds": round(row.seconds, 1),
            }
            for row in rows
        ]
        print(json.dumps({"machine": machine(), "rows": content}, indent=1))
    else:
        out = Console(width=160)
        out.print(machine(), highlight=False)
        out.print(table_of(rows))
    return exit_code(rows)


if __name__ == "__main__":
    sys.exit(main())
