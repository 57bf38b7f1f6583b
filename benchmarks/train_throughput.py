"""Forward and backward of LoRA training, in effective tokens a second: `python benchmarks/train_throughput.py`.

G completions of R tokens after one prompt of P tokens, LoRA r=8 on all seven projections. "stock" is plain transformers
and PEFT in micro-batches; "dense" is art-training-kit with prompts that share nothing; "shared" is art-training-kit
with one shared prompt. Effective tokens are G(P+R) in all three. Each mode runs in a process of its own, so that its
peak memory is its own. The cap is what matrix products alone would allow: measured GEMM speed over 4 FLOP a parameter
and token.
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
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

MODES = ("stock", "dense", "shared")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def measure(
    mode: str, base: Path, shape: tuple[int, int, int], dtype: str, threads: int, repeats: int
) -> dict[str, Any]:
    """Runs in its own process."""
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from art_engine_kit.train_options import TrainOptions
    from art_engine_torch.training.policy import load_policy
    from art_training_kit.allocator import keep_freed_memory
    from art_training_kit.device_choice import compute_dtype
    from art_training_kit.packing import pack_rows
    from art_training_kit.policy import PolicyRequest
    from art_training_kit.row_tensors import RowTensors
    from art_training_kit.rows import TokenRow

    keep_freed_memory()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    prompt, response, group = shape
    rng = np.random.default_rng(0)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    config = LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=compute_dtype(device, dtype))
    model = model.to(device)
    parameters = sum(p.numel() for p in model.parameters())
    stock = get_peft_model(model, config)
    same = rng.integers(3, 49000, prompt)
    rows = [
        np.concatenate([same if mode == "shared" else rng.integers(3, 49000, prompt), rng.integers(3, 49000, response)])
        for _ in range(group)
    ]
    step: Callable[[], None]
    if mode == "stock":
        ids: Any = torch.from_numpy(np.stack(rows)).to(device)

        def step() -> None:
            for batch in ids.split(4):
                logits = stock(input_ids=batch).logits[:, prompt - 1 : -1]
                chosen = logits.gather(-1, batch[:, prompt:, None]).squeeze(-1)
                (chosen - logits.logsumexp(-1)).sum().backward()
            stock.zero_grad(set_to_none=True)
    else:
        with TemporaryDirectory() as folder:
            stock.save_pretrained(folder)
            del model, stock
            policy = load_policy(PolicyRequest(base, dtype=dtype))  # type: ignore[arg-type]
            policy.load_adapter(Path(folder))
        trained = np.arange(prompt, prompt + response, dtype=np.int32)
        unknown = np.full(response, np.nan, np.float32)
        made = [TokenRow(row.astype(np.int32), trained, unknown, i) for i, row in enumerate(rows)]
        packed = pack_rows(made, max(4096, prompt + response))
        tensors = [RowTensors.of(row, np.ones(group), np.ones(group), device) for row in packed]

        def step() -> None:
            for row in tensors:
                loss: Any = row.loss(policy, TrainOptions())[0].loss
                loss.backward()
            for parameter in policy.adapter_parameters().values():
                parameter.grad = None

    times = []
    for _ in range(repeats + 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start, time.process_time() - cpu_start))
    # The first run takes its memory from the system; the later ones have it.
    seconds, cpu_seconds = (min(column) for column in zip(*times[1:], strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Linux" else 2**30)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    return {
        "mode": mode,
        "tokens_per_s": round(group * (prompt + response) / seconds, 1),
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "peak_GiB": round(peak, 2),
        "parameters": parameters,
        "dtype": str(compute_dtype(device, dtype)).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
    }


def gemm_speed(dtype: str, threads: int) -> float:
    """FLOP a second of a large matrix product, the best of several."""
    import torch

    from art_training_kit.device_choice import compute_dtype

    torch.set_num_threads(threads)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
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


def main() -> None:
    """Measure each mode and print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", type=Path, help="a folder of weights; SmolLM2-135M-Instruct unless given")
    parser.add_argument("--shape", default="256,32,8", help="P,R,G")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    p, r, g = (int(x) for x in arguments.shape.split(","))
    base = arguments.base_model
    if base is None:
        from art_engine_torch.base_model import resolve_base_model

        base = resolve_base_model("smollm2-135m-instruct")
    if arguments.mode:
        found = measure(arguments.mode, base, (p, r, g), arguments.dtype, arguments.threads, arguments.repeats)
        print(json.dumps(found))
        return
    results = []
    for mode in arguments.modes.split(","):
        command = [sys.executable, __file__, "--mode", mode, "--base-model", str(base), "--shape", arguments.shape]
        command += ["--dtype", arguments.dtype, "--threads", str(arguments.threads)]
        command += ["--repeats", str(arguments.repeats)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=3600)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    speed = gemm_speed(arguments.dtype, arguments.threads)
    cap = speed / (4 * results[0]["parameters"])
    report = {
        "shape": {"P": p, "R": r, "G": g},
        "modes": results,
        "gemm_GFLOP_per_s": round(speed / 1e9, 1),
        "cap_tokens_per_s": round(cap, 1),
        "sharing_bound": round(g * (p + r) / (p + g * r), 2),
        "threads": arguments.threads,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "art-training-kit")},
    }
    if arguments.json:
        print(json.dumps(report))
        return
    first = results[0]
    print(f"{first['device']}, {arguments.threads} threads, {first['dtype']}; {report['versions']}")
    print(f"P={p} R={r} G={g}; GEMM {speed / 1e9:.0f} GFLOP/s, cap {cap:.0f} tokens/s without sharing")
    for result in results:
        share = result["tokens_per_s"] / cap
        print(
            f"{result['mode']:>8}  {result['tokens_per_s']:8.1f} tokens/s  {result['seconds']:7.3f} s"
            f"  {result['cpu_seconds']:7.3f} CPU s  {result['peak_GiB']:5.2f} GiB  {share:5.0%} of the cap"
        )
    by_mode = {result["mode"]: result for result in results}
    if {"dense", "shared"} <= by_mode.keys():
        bound = g * (p + r) / (p + g * r)
        for column in ("seconds", "cpu_seconds"):
            gain = by_mode["dense"][column] / by_mode["shared"][column]
            print(f"sharing, by {column}: {gain:.2f}x of at most {bound:.2f}x ({gain / bound:.0%})")


if __name__ == "__main__":
    main()
