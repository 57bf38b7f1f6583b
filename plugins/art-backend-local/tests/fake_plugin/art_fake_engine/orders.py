"""What a test orders the fakes to do wrong or to wait for, read from a file at each request."""

import asyncio
import json
import os
from pathlib import Path


def order(name, default=None):
    """The order of that name, or the default."""
    try:
        return json.loads(Path(os.environ["ART_FAKE_ORDERS"]).read_text(encoding="utf-8")).get(name, default)
    except (KeyError, OSError, ValueError):
        return default


async def held(name):
    """Wait for as long as the order of that name stands."""
    while order(name):
        await asyncio.sleep(0.02)


def logprob_of(folder):
    """The logprob that an adapter gives to every token: a function of its B weights and of nothing else."""
    from safetensors.numpy import load_file

    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    return -1.0 - float(sum(value.sum() for name, value in tensors.items() if "lora_B" in name))
