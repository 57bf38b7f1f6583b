"""How long a trained step takes to be served: from the optimizer's end to the first token of the new version.

    python benchmarks/publish_latency.py --engine torch
    python benchmarks/publish_latency.py --engine vllm --publishes 10 --in-flight 16

Real training steps, small ones, through LocalBackend, while `--in-flight` chat completions are under way through the
gateway all the time. The clock starts at the optimizer's last step, as the training worker's log has it
(`verbose=True`), and ends when a request for one token is answered that is sent, beside the others, as soon as the step
is announced as published. The stages between:

    written      the trainer writes the adapter
    save         it writes the optimizer's state and computes what this checkpoint is to answer, everything is hashed
                 and synced to disk, and the client is told; the engine loads the adapter meanwhile
    hooks        plugins are asked whether to publish, the host is told to, and plugins are told of it
    checked      the file's hashes, shapes and values
    loaded       what is left of the engine's own load of the adapter
    verified     what is left until the engine has answered the canary, as this checkpoint
    routed       new requests go to it
    first token  a request for one token, through the gateway

"beyond load" is everything but the engine's own load; its targets are p50 < 100 ms and p99 < 250 ms. "usual first
token" is the same request between two publishes: what the engine takes under this load whatever is published. Every
answer of the traffic is checked: its model, x-art-step and policy_version against what was asked. Exits with 1 when one
failed or was mislabelled.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from measuring.quantiles import quantile
from measuring.rollout_traffic import SeenSteps, Traffic, small_groups
from measuring.traffic_benchmark import answers_of, run_benchmark, serving_one_model, traffic_parser
from rich.console import Console
from rich.progress import track
from rich.table import Table

from art_core import CheckpointRef, PublicationReceipt, hookimpl, installed_plugins
from art_engine_kit.checkpoint_folder import ADAPTER_CONFIG

STAGES = ("written", "save", "hooks", "checked", "loaded", "verified", "routed", "first token")
ENGINE_OWN = "loaded"
TARGETS_MS = {"p50": 100.0, "p99": 250.0}
WARM_UP = 1
GRADIENT_STEP = re.compile(r"^(\S+ \S+) .* step (\d+), gradient step (\d+) of \3:")


@dataclass
class Watch(SeenSteps):
    """Notes when a step is saved and published, and asks for its first token. Times are Unix seconds, by step."""

    traffic: Traffic | None = None
    written_at: dict[int, float] = field(default_factory=dict)
    saved_at: dict[int, float] = field(default_factory=dict)
    published_at: dict[int, float] = field(default_factory=dict)
    answered: dict[int, float] = field(default_factory=dict)
    receipts: dict[int, PublicationReceipt] = field(default_factory=dict)

    @hookimpl
    def art_checkpoint_saved(self, checkpoint: CheckpointRef) -> None:
        """Whole on disk."""
        self.saved_at[checkpoint.step] = time.time()
        self.written_at[checkpoint.step] = (checkpoint.path / ADAPTER_CONFIG).stat().st_mtime
        super().art_checkpoint_saved(checkpoint)

    @hookimpl
    async def art_checkpoint_published(  # type: ignore[override]  # a hook takes as many of its arguments as it reads
        self, checkpoint: CheckpointRef, receipt: PublicationReceipt
    ) -> None:
        """Served; ask at once. Raises RuntimeError when another step answers."""
        self.published_at[checkpoint.step] = time.time()
        await super().art_checkpoint_published(checkpoint)
        self.receipts[checkpoint.step] = receipt
        if self.traffic is not None:
            self.answered[checkpoint.step], version = await self.traffic.first_token()
            if version != checkpoint.step:
                raise RuntimeError(f"step {checkpoint.step} is published, and step {version} answers")


def optimizer_ends(logs: Path) -> dict[int, float]:
    """When the last optimizer step of each training step was done, Unix seconds, from the workers' logs."""
    ends = {}
    for log in sorted(logs.glob("training-*.log")):
        for line in log.read_text(errors="replace", encoding="utf-8").splitlines():
            found = GRADIENT_STEP.match(line)
            if found:
                ends[int(found[2])] = datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S,%f").timestamp()
    return ends


def stages_of(watch: Watch, ends: Mapping[int, float], steps: Sequence[int]) -> list[dict[str, float]]:
    """The seconds of each stage of each step. Raises RuntimeError for a step that something is missing of."""
    rows = []
    for step in steps:
        if step not in ends or step not in watch.answered:
            missing = "end of its optimizer in the worker's log" if step not in ends else "first token"
            raise RuntimeError(f"step {step} has no {missing}")
        spent = watch.receipts[step].seconds
        known = {stage: spent[stage] for stage in ("checked", "loaded", "verified", "routed")}
        begun, told = watch.saved_at[step], watch.published_at[step]
        rows.append(
            {
                "written": watch.written_at[step] - ends[step],
                "save": begun - watch.written_at[step],
                # What the host's stages leave of the time between the two moments that the client sees.
                "hooks": told - begun - sum(known.values()),
                **known,
                "first token": watch.answered[step] - told,
            }
        )
    return rows


def summary(rows: Sequence[Mapping[str, float]], usual: Sequence[float]) -> dict[str, dict[str, float]]:
    """p50 and p99 in milliseconds of every stage, of everything, of everything but the engine's own load, and of the
    usual first token.
    """
    columns = {stage: [row[stage] for row in rows] for stage in STAGES}
    columns["total"] = [sum(row.values()) for row in rows]
    columns["beyond load"] = [sum(row.values()) - row[ENGINE_OWN] for row in rows]
    columns["usual first token"] = list(usual)
    return {
        name: {"p50": 1000 * quantile(values, 0.5), "p99": 1000 * quantile(values, 0.99)}
        for name, values in columns.items()
    }


async def measure(arguments: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Train and publish, with traffic, and give what was found."""
    watch = Watch()
    installed_plugins().register(watch, name="publish-latency")
    async with serving_one_model(arguments, folder, console) as (backend, model, registration):
        groups = await small_groups(model, arguments.tokens)
        async with Traffic(model.name, registration, watch, arguments.tokens) as traffic:
            watch.traffic = traffic
            traffic.keep_in_flight(arguments.in_flight)
            made, usual = [], []
            began = time.monotonic()
            for _ in track(range(WARM_UP + arguments.publishes), "publishing", console=console):
                asked = time.time()
                usual.append((await traffic.first_token())[0] - asked)
                result = await backend.train(model, groups, learning_rate=arguments.learning_rate, verbose=True)
                made.append(result.step)
            seconds = time.monotonic() - began
        rows = stages_of(watch, optimizer_ends(backend.path / "logs"), made[WARM_UP:])
    return {
        "engine": arguments.engine,
        "base_model": Path(model.base_model).name,
        "publishes": len(rows),
        "in_flight": arguments.in_flight,
        "milliseconds": summary(rows, usual[WARM_UP:]),
        "each": rows,
        "tokens_per_s": traffic.tokens / seconds,
        **answers_of(traffic),
    }


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print the table and the verdict."""
    console.print(
        f"{result['engine']}, {result['base_model']}: {result['publishes']} publishes, {result['in_flight']} requests"
        " in flight",
        highlight=False,
    )
    table = Table("stage", "p50", "p99")
    for name, found in result["milliseconds"].items():
        label = f"{name} (the engine's own)" if name == ENGINE_OWN else name
        table.add_row(
            label, f"{found['p50']:.0f} ms", f"{found['p99']:.0f} ms", end_section=name in (STAGES[-1], "beyond load")
        )
    console.print(table)
    beyond = result["milliseconds"]["beyond load"]
    for quantile_name, limit in TARGETS_MS.items():
        word = "met" if beyond[quantile_name] < limit else "NOT met"
        console.print(f"beyond load, {quantile_name} < {limit:.0f} ms: {word}", highlight=False)
    console.print(f"{result['tokens_per_s']:.0f} tokens/s were generated meanwhile", highlight=False)


def main() -> None:
    """Measure and print; exit with 1 when a request failed or was mislabelled."""
    parser = traffic_parser(__doc__)
    parser.add_argument("--publishes", type=int, default=30, help="steps that are measured (default 30)")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    run_benchmark(parser.parse_args(), measure, show, packages=("art-backend-local", "art-training-kit"))


if __name__ == "__main__":
    main()
