"""Forward and backward of LoRA training, in effective tokens a second, beside transformers with PEFT and TRL.

    python benchmarks/train_throughput.py
    python benchmarks/train_throughput.py --shapes 4096,256,16 --without-peers

LoRA r=8 on all seven projections. A shape is P,R,G, which is G answers of R tokens after one prompt of P tokens, or
"turns", conversations whose every turn is a sequence of its own.

    plain   transformers and PEFT in micro-batches
    trl     TRL's GRPOTrainer: its loss and backward pass for a step that it has sampled and scored
    dense   art-training-kit and engine torch, on sequences of the same lengths that share nothing
    shared  the same on the sequences as they are, what they share computed once

The peers are given environments of their own, made once, and freed memory is kept in their processes as it is in ours.
Each tries every dtype of `--peer-dtypes` on the first shape and keeps the fastest for the others. Each mode runs in a
process of its own, so that its peak memory is its own. Effective tokens are those of all sequences, in every mode. The
cap is what matrix products alone would allow without sharing: GEMM speed, measured in the same run, over 4 FLOP a
parameter and token.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from measuring.machine import machine, versions
from measuring.peer_environment import PLAIN, TRL, printed_object, run_peer
from measuring.training_rows import (
    TURNS,
    TrainedSequence,
    sequences_of,
    sharing_bound,
    sharing_nothing,
    total_tokens,
)
from rich.console import Console
from rich.table import Table

from art_engine_kit.base_shapes import SEVEN_PROJECTIONS

OURS = ("dense", "shared")
PEERS = {PLAIN.name: PLAIN, TRL.name: TRL}
LORA: Mapping[str, Any] = {
    "r": 8,
    "lora_alpha": 16,
    "target_modules": list(SEVEN_PROJECTIONS),
    "task_type": "CAUSAL_LM",
}
SHORTEST_ROW = 4096
# glibc's own variables for what `keep_freed_memory` does in our process, at the most that each may be.
KEEP_FREED = {"MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
Steps = Mapping[str, list[TrainedSequence]]  # by shape


def vocabulary_of(base: Path) -> range:
    """The token ids to draw from; the first few of a vocabulary are special."""
    return range(3, json.loads((base / "config.json").read_text(encoding="utf-8"))["vocab_size"])


def measure(mode: str, shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Ours, in this process."""
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from art_engine_kit.train_options import TrainOptions
    from art_engine_torch.training.policy import load_policy
    from art_training_kit.allocator import keep_freed_memory
    from art_training_kit.device_choice import compute_device, compute_dtype
    from art_training_kit.packing import pack_rows
    from art_training_kit.policy import PolicyRequest
    from art_training_kit.row_tensors import RowTensors
    from art_training_kit.rows import TokenRow

    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = compute_device("auto")
    with TemporaryDirectory() as folder:
        dtype = compute_dtype(device, arguments.dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(arguments.base_model, dtype=dtype)
        parameters = model.num_parameters()
        get_peft_model(model, LoraConfig(**LORA)).save_pretrained(folder)
        del model
        policy = load_policy(PolicyRequest(arguments.base_model, dtype=arguments.dtype))
        policy.load_adapter(Path(folder))
    vocabulary = vocabulary_of(arguments.base_model)
    sequences = sequences_of(shape, vocabulary)
    rows = [
        TokenRow(
            each.token_ids,
            np.arange(each.begin, len(each.token_ids), dtype=np.int32),
            np.full(len(each.token_ids) - each.begin, np.nan, np.float32),
            trajectory,
        )
        for trajectory, each in enumerate(sequences if mode == "shared" else sharing_nothing(sequences, vocabulary))
    ]
    packed = pack_rows(rows, max(SHORTEST_ROW, *map(len, rows)))
    ones = np.ones(len(rows))
    tensors = [RowTensors.of(row, ones, ones, device) for row in packed]
    seconds = []
    for _ in range(arguments.repeats + 1):
        start = time.perf_counter()
        for row in tensors:
            loss: Any = row.loss(policy, TrainOptions())[0].loss
            loss.backward()
        for parameter in policy.adapter_parameters().values():
            parameter.grad = None
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Linux" else 2**30)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    return {
        # The first pass takes its memory from the system; the later ones have it.
        "seconds": round(min(seconds[1:]), 3),
        "peak_GiB": round(peak, 2),
        "dtype": str(dtype).removeprefix("torch."),
        "tokens_computed": sum(map(len, packed)),
        "parameters": parameters,
    }


def measure_apart(mode: str, shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Ours, in a process of its own."""
    command = [sys.executable, __file__, "--mode", mode, "--base-model", str(arguments.base_model), "--shapes", shape]
    command += ["--dtype", arguments.dtype, "--threads", str(arguments.threads), "--repeats", str(arguments.repeats)]
    return printed_object(subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False), mode)


def measure_peer(
    mode: str, sequences: list[TrainedSequence], dtype: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """A peer in one dtype, in its own environment and process."""
    settings = {
        "trainer": mode,
        "lora": LORA,
        "base": str(arguments.base_model),
        "dtype": dtype,
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "micro_batch": arguments.micro_batch,
        "sequences": [[each.token_ids.tolist(), each.begin] for each in sequences],
    }
    return run_peer(PEERS[mode], "lora_step.py", settings, env={**KEEP_FREED, "HF_HUB_OFFLINE": "1"})


def gemm_speed(dtype: str, threads: int) -> float:
    """FLOP a second of a large matrix product, the best of several."""
    import torch

    from art_training_kit.device_choice import compute_device, compute_dtype

    torch.set_num_threads(threads)
    device = compute_device("auto")
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(compute_dtype(device, dtype))
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return float(2 * n**3 / best)


def measure_modes(console: Console, steps: Steps, arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Every mode on every shape, said as it is measured: by shape, the peers' and ours."""
    found: dict[str, list[dict[str, Any]]] = {shape: [] for shape in steps}

    def tell(shape: str, mode: str, result: dict[str, Any]) -> dict[str, Any]:
        console.print(f"{shape} {mode}, {result['dtype']}: {result['seconds']:.2f} s", highlight=False)
        return {"mode": mode, **result}

    for mode in () if arguments.without_peers else PEERS:
        dtypes = arguments.peer_dtypes
        for shape, results in found.items():
            tried = [tell(shape, mode, measure_peer(mode, steps[shape], dtype, arguments)) for dtype in dtypes]
            results.append(min(tried, key=lambda result: result["seconds"]))
            dtypes = [results[-1]["dtype"]]
    for shape, results in found.items():
        results += [tell(shape, mode, measure_apart(mode, shape, arguments)) for mode in OURS]
    return found


def compare(
    shape: str, sequences: list[TrainedSequence], results: list[dict[str, Any]], gemm_flops: float
) -> dict[str, Any]:
    """The modes of one shape beside each other."""
    cap = gemm_flops / (4 * results[-1]["parameters"])
    for result in results:
        result["tokens_per_s"] = round(total_tokens(sequences) / result["seconds"], 1)
        result["share_of_cap"] = round(result["tokens_per_s"] / cap, 3)
    by_mode = {result["mode"]: result for result in results}
    bound = sharing_bound(sequences)
    gain = by_mode["dense"]["seconds"] / by_mode["shared"]["seconds"]
    return {
        "shape": shape,
        "cap_tokens_per_s": round(cap, 1),
        "modes": results,
        "sharing": round(gain, 2),
        "sharing_bound": round(bound, 2),
        **{
            f"{ours}_over_{peer}": round(by_mode[ours]["tokens_per_s"] / by_mode[peer]["tokens_per_s"], 2)
            for ours in OURS
            for peer in PEERS
            if peer in by_mode
        },
    }


def show(console: Console, report: dict[str, Any]) -> None:
    """A table of each shape, and what it comes to in words."""
    for shape in report["shapes"]:
        title = f"{shape['shape']}: cap {shape['cap_tokens_per_s']:,.0f} tokens/s without sharing"
        table = Table("mode", "dtype", "tokens/s", "seconds", "peak, GiB", "of the cap", title=title)
        for each in shape["modes"]:
            table.add_row(
                each["mode"], each["dtype"], f"{each['tokens_per_s']:,.0f}", f"{each['seconds']:.2f}",
                f"{each['peak_GiB']:.2f}", f"{each['share_of_cap']:.0%}",
            )  # fmt: skip
        console.print(table)
        gain, bound = shape["sharing"], shape["sharing_bound"]
        parts = [f"sharing {gain:.2f}x of at most {bound:.2f}x ({gain / bound:.0%})"]
        if "dense_over_trl" in shape:
            parts += [f"{ours} over {peer} {shape[f'{ours}_over_{peer}']:.2f}x" for ours in OURS for peer in PEERS]
        console.print("; ".join(parts), highlight=False)
    console.print(f"GEMM {report['gemm_GFLOP_per_s']:,.0f} GFLOP/s on {report['threads']} threads", highlight=False)
    console.print(f"{report['machine']}\n{report['versions']}", highlight=False)


def parse_arguments() -> argparse.Namespace:
    """A quarter of an hour at the defaults, on two cores with fast bf16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", type=Path, help="a folder of weights; SmolLM2-135M-Instruct unless given")
    parser.add_argument("--shapes", nargs="+", default=["256,32,8", "1024,128,8", TURNS], metavar="P,R,G")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of ours")
    parser.add_argument(
        "--peer-dtypes", nargs="+", choices=("float32", "bfloat16"), help="those to try: both where bf16 is fast"
    )
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences that a peer computes at once")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without-peers", action="store_true", help="make no environments for them")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--mode", choices=OURS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for shape in arguments.shapes:
        try:
            sequences_of(shape, range(1, 2))
        except ValueError as error:
            parser.error(str(error))
    return arguments


def main(arguments: argparse.Namespace) -> None:
    """Measure every mode on every shape, and show it."""
    import torch

    from art_engine_torch.base_model import resolve_base_model
    from art_training_kit.device_choice import compute_device, compute_dtype

    if arguments.base_model is None:
        arguments.base_model = resolve_base_model("smollm2-135m-instruct")
    if arguments.mode:
        print(json.dumps(measure(arguments.mode, arguments.shapes[0], arguments)))
        return
    if arguments.peer_dtypes is None:
        device = compute_device("auto")
        fast = compute_dtype(device, "auto") == torch.bfloat16
        arguments.peer_dtypes = ["bfloat16", "float32"] if fast else ["float32"]
    console = Console(stderr=arguments.json)
    where = {"machine": machine(), "versions": versions([], ["torch", "transformers", "peft", "art-training-kit"])}
    speed = gemm_speed(arguments.dtype, arguments.threads)
    vocabulary = vocabulary_of(arguments.base_model)
    steps = {shape: sequences_of(shape, vocabulary) for shape in arguments.shapes}
    found = measure_modes(console, steps, arguments)
    shapes = [compare(shape, steps[shape], results, speed) for shape, results in found.items()]
    report = {**where, "threads": arguments.threads, "gemm_GFLOP_per_s": round(speed / 1e9, 1), "shapes": shapes}
    if not arguments.without_peers:
        report["versions"] += (
            f"; peers: {', '.join(dict.fromkeys(each for peer in PEERS.values() for each in peer.requirements))}"
        )
    if arguments.json:
        print(json.dumps(report))
    else:
        show(console, report)


if __name__ == "__main__":
    main(parse_arguments())
