"""How fast a step's trajectories become packed rows, and how full those are, beside openpipe-art and TRL.

    python benchmarks/tokenize_pack.py
    python benchmarks/tokenize_pack.py --shapes

Makes 64 groups of 8 four-turn conversations with random token ids, as the gateway returns them, and times writing the
groups file, reading it, tokenizing and packing (CPU seconds of one thread, best of several runs). The peers, in
environments of their own that are made once, tokenize and pack the same conversations, with the same ids given. Prints
the machine and the versions. `--shapes` packs steps of other shapes instead, by ours alone: prompts and answers long
and short, continuations, equal and random lengths.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from measuring.machine import machine, versions
from measuring.peer_environment import OPENPIPE, TRL, run_peer
from measuring.step_shapes import SHAPES
from openai.types.chat.chat_completion import Choice
from rich.console import Console
from rich.table import Table

from art_core.trajectories import Trajectory, TrajectoryGroup
from art_engine_kit.groups_file import read_records, write_groups
from art_training_kit.packing import pack_rows
from art_training_kit.prefix_tree import sort_rows
from art_training_kit.rows import TokenizedStep, TokenRow
from art_training_kit.tokenize import tokenize_groups

VOCABULARY = 49152
PEERS = {OPENPIPE.name: OPENPIPE, TRL.name: TRL}


def make_step(rng: np.random.Generator, groups: int, size: int, turns: int) -> list[TrajectoryGroup]:
    """Groups over one system prompt; each trajectory's own answers and what the user or a tool said to them."""
    system = rng.integers(3, VOCABULARY, 24).tolist()
    return [
        TrajectoryGroup([_conversation(rng, prompt, turns, float(rng.random())) for _ in range(size)])
        for prompt in (
            system + rng.integers(3, VOCABULARY, int(rng.integers(200, 280))).tolist() for _ in range(groups)
        )
    ]


def _conversation(rng: np.random.Generator, prompt: list[int], turns: int, reward: float) -> Trajectory:
    items: list[Any] = [{"role": "user", "content": "question"}]
    for _ in range(turns):
        ids = rng.integers(3, VOCABULARY, int(rng.integers(30, 80))).tolist()
        content = [{"token": "t", "logprob": float(x), "top_logprobs": []} for x in -rng.exponential(size=len(ids))]
        items.append(
            Choice.model_validate(
                {
                    "finish_reason": "stop", "index": 0, "message": {"role": "assistant", "content": "answer"},
                    "logprobs": {"content": content}, "token_ids": ids, "prompt_token_ids": prompt, "policy_version": 3,
                }
            )
        )  # fmt: skip
        items.append({"role": "user", "content": "and then"})
        prompt = prompt + ids + rng.integers(3, VOCABULARY, int(rng.integers(20, 60))).tolist()
    return Trajectory(messages_and_choices=items, reward=reward)


def best_of(repeats: int, function: Callable[[], Any]) -> float:
    """Seconds of the fastest run."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def packing_of(rows: list[TokenRow], capacity: int) -> dict[str, float]:
    """How many packed rows, how full, and how many tokens are left of all; each beside what counting allows."""
    lengths = [len(row) for row in pack_rows(rows, capacity)]
    tokens = sum(map(len, rows))
    least = sort_rows([row.token_ids[: row.trained[-1]] for row in rows]).least_tokens(capacity)
    return {
        "rows": len(lengths),
        "rows_at_least": -(-least // capacity),
        "fill": round(sum(lengths) / (len(lengths) * capacity), 4),
        "fill_without_last_row": round(sum(lengths[:-1]) / max(1, (len(lengths) - 1) * capacity), 4),
        "tokens_left": round(sum(lengths) / tokens, 4),
        "tokens_left_at_least": round(least / tokens, 4),
    }


def compare_shapes(repeats: int, *, as_json: bool) -> None:
    """Pack a step of each shape and print what became of it."""
    found = []
    for shape in SHAPES:
        rows = shape.rows()
        seconds = best_of(repeats, lambda rows=rows, shape=shape: pack_rows(rows, shape.capacity))  # type: ignore[misc]
        found.append({"shape": shape.name, **packing_of(rows, shape.capacity), "pack_ms": round(seconds * 1000, 1)})
    if as_json:
        print(json.dumps(found))
        return
    columns = ("rows", "rows_at_least", "fill", "tokens_left", "tokens_left_at_least", "pack_ms")
    print(f"{'shape':30}" + "".join(f"{name:>22}" for name in columns))
    for each in found:
        print(f"{each['shape']:30}" + "".join(f"{each[name]:22,}" for name in columns))


def measure(arguments: argparse.Namespace, groups: list[TrajectoryGroup]) -> dict[str, Any]:
    """Ours: writing, reading, tokenizing, packing."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "step.groups"
        writing = best_of(arguments.repeats, lambda: write_groups(file, groups))
        reading = best_of(arguments.repeats, lambda: list(read_records(file)))
        records, size = list(read_records(file)), file.stat().st_size

    def tokenize() -> TokenizedStep:
        return tokenize_groups(records, vocabulary_size=VOCABULARY, max_length=arguments.row)

    step = tokenize()
    tokens = step.num_tokens
    tokenizing = best_of(arguments.repeats, tokenize)
    packing = best_of(arguments.repeats, lambda: pack_rows(step.rows, arguments.row))
    return {
        "tokens": tokens,
        **speeds(tokens, tokenizing, packing),
        "write_file_tokens_per_s": round(tokens / writing),
        "read_file_tokens_per_s": round(tokens / reading),
        "all_tokens_per_s": round(tokens / (writing + reading + tokenizing + packing)),
        "file_bytes_per_token": round(size / tokens, 2),
        **packing_of(step.rows, arguments.row),
    }


def speeds(tokens: int, tokenizing: float, packing: float) -> dict[str, int]:
    """Tokens of all sequences a CPU second."""
    return {
        "tokenize_tokens_per_s": round(tokens / tokenizing),
        "pack_tokens_per_s": round(tokens / packing),
        "tokenize_and_pack_tokens_per_s": round(tokens / (tokenizing + packing)),
    }


def measure_peer(name: str, groups: list[TrajectoryGroup], arguments: argparse.Namespace) -> dict[str, Any]:
    """A peer's tokenizing and packing of the same conversations, in its own environment and process."""
    from art_engine_torch.base_model import resolve_base_model

    items = [
        [
            (
                each.reward,
                [x.model_dump(mode="json") if isinstance(x, Choice) else x for x in each.messages_and_choices],
            )
            for each in group.trajectories
        ]
        for group in groups
    ]
    settings = {
        "groups": items,
        "capacity": arguments.row,
        "repeats": arguments.repeats,
        "tokenizer": str(resolve_base_model("smollm2-135m-instruct")),
    }
    found = run_peer(PEERS[name], "step_packing.py", settings, name)
    return {
        "version": found["version"],
        "tokens": found["tokens"],
        **speeds(found["tokens"], found["tokenizing"], found["packing"]),
        "rows": found["rows"],
        "fill": round(found["packed"] / (found["rows"] * arguments.row), 4),
        "tokens_left": round(found["packed"] / found["tokens"], 4),
    }


def show(report: dict[str, Any]) -> None:
    """What is measured in lines, and ours and the peers' beside each other where there are peers."""
    columns: dict[str, dict[str, Any]] = {"ours": report["ours"], **report["peers"]}
    table = Table()
    table.add_column(no_wrap=True)
    for name, found in columns.items():
        table.add_column(f"{name} {found.get('version', '')}".strip(), justify="right")
    for figure in report["ours"]:
        values = [found.get(figure) for found in columns.values()]
        table.add_row(figure, *("" if value is None else f"{value:,}" for value in values))
    console = Console()
    console.print(table)
    for name, found in report["peers"].items():
        ratios = [
            f"{what} {report['ours'][our] / found[their]:.1f}x"
            for what, our, their in (
                ("tokenize", "tokenize_tokens_per_s", "tokenize_tokens_per_s"),
                ("pack", "pack_tokens_per_s", "pack_tokens_per_s"),
                ("both", "tokenize_and_pack_tokens_per_s", "tokenize_and_pack_tokens_per_s"),
                # A peer has no file: its groups stay in the process that trains.
                ("ours by the file", "all_tokens_per_s", "tokenize_and_pack_tokens_per_s"),
            )
        ]
        console.print(f"ours over {name}: {', '.join(ratios)}", highlight=False)
    console.print(f"{report['machine']}\n{report['versions']}", highlight=False)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--row", type=int, default=8192, help="tokens of a packed row")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--without-peers", action="store_true", help="make no environments for them")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with --shapes a list of them")
    parser.add_argument("--shapes", action="store_true", help="only pack, steps of many shapes")
    arguments = parser.parse_args()
    if arguments.shapes:
        compare_shapes(arguments.repeats, as_json=arguments.json)
        return
    groups = make_step(np.random.default_rng(0), arguments.groups, arguments.size, arguments.turns)
    report = {
        "machine": machine(),
        "versions": versions([], ["numpy", "art-training-kit"]),
        "ours": measure(arguments, groups),
        "peers": {name: measure_peer(name, groups, arguments) for name in (() if arguments.without_peers else PEERS)},
    }
    if arguments.json:
        print(json.dumps(report))
    else:
        show(report)


if __name__ == "__main__":
    main()
