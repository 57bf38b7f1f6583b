"""Chooses device, number format and memory for a model, and loads it.

Knows this machine. Nothing here runs while requests are answered.
"""

from __future__ import annotations

import argparse
import logging
import platform
from pathlib import Path
from typing import Final

import psutil
import torch
from transformers.utils import logging as transformers_logging

from .decoder import Decoder
from .scheduler import Limits, Scheduler

logger = logging.getLogger(__name__)
# Parts of the memory that is free once the weights are loaded. On a GPU a trainer may have to live beside the server.
CPU_CACHE_PART: Final = 0.4
CUDA_CACHE_PART: Final = 0.5
PREFIX_PART: Final = 0.15
GIB: Final = 1 << 30


def choose_device(asked: str) -> torch.device:
    """ "auto" is the first GPU if there is one. Raises ValueError for a GPU that isn't there."""
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(asked)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {asked}: torch {torch.__version__} sees no CUDA device here; use --device cpu.")
    return device


def choose_dtype(asked: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the hardware multiplies it fast (CUDA; AVX512-BF16 or AMX on a CPU), else float32."""
    if asked != "auto":
        dtype = getattr(torch, asked)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if {"avx512_bf16", "amx_bf16"} & cpu_flags() else torch.float32


def cpu_flags() -> frozenset[str]:
    """The processor's features by Linux's names; empty where they can't be read."""
    path = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not path.exists():
        return frozenset()
    line = next((line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def build_scheduler(options: argparse.Namespace) -> Scheduler:
    """Loads the model of the server's command line and sizes its memory."""
    if not (options.model / "config.json").is_file():
        raise ValueError(f"--model {options.model} is no model folder: it has no config.json.")
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    decoder = Decoder.load(options.model, device, dtype, options.max_model_len)
    max_len = options.max_model_len or decoder.shape.max_positions
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    token_bytes = decoder.shape.kv_numbers_per_token * dtype.itemsize
    part = CUDA_CACHE_PART if on_gpu else CPU_CACHE_PART
    cache_bytes = free * part if options.kv_cache_gb is None else options.kv_cache_gb * GIB
    prefix_bytes = free * PREFIX_PART if options.prefix_cache_gb is None else options.prefix_cache_gb * GIB
    limits = Limits(
        max_len=max_len,
        max_sequences=options.max_num_seqs or (256 if on_gpu else 128),
        batch_tokens=options.max_batch_tokens or (8192 if on_gpu else 512),
        cache_tokens=int(cache_bytes // token_bytes),
        prefix_bytes=int(prefix_bytes),
    )
    scheduler = Scheduler(decoder, limits)
    decoder.probe()
    logger.info(
        "Serving %s on %s in %s: context %d tokens, cache up to %.1f GiB (%d tokens), %d sequences at once.",
        options.model,
        device,
        str(dtype).removeprefix("torch."),
        max_len,
        cache_bytes / GIB,
        limits.cache_tokens,
        limits.max_sequences,
    )
    return scheduler
