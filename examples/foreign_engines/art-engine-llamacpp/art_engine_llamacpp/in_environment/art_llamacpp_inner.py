"""One llama.cpp server with the adapters that it was started with, which are all it will ever have.

Reads what to serve as JSON from its first line of input, says where it listens in one line, and ends when its input
does, so that it never outlives who started it. Runs in the engine's own environment.
"""

from __future__ import annotations

import json
import os
import sys

import xllamacpp


def main() -> None:
    """Serve until the input ends."""
    told = json.loads(sys.stdin.readline())
    params = xllamacpp.CommonParams()
    params.model.path = told["model"]
    params.port = 0
    params.api_keys = [told["api_key"]]
    params.n_parallel = told["slots"]
    params.n_ctx = told["slots"] * told["context"]
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(file, 0.0) for file in told["adapters"]]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = told["threads"]
    if told["template"] is not None:
        params.chat_template = told["template"]
    if told["exact"]:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.verbosity = 1
    params.warmup = params.fit_params = params.ui = params.endpoint_slots = False
    # Prompts that are kept in memory are found again by their tokens alone, whatever adapter they were read with.
    params.cache_ram_mib = 0
    # What a request doesn't say must change nothing: llama.cpp would cut off unlikely tokens.
    sampling = params.sampling
    sampling.temp, sampling.top_k, sampling.top_p, sampling.min_p = 1.0, 0, 1.0, 0.0
    server = xllamacpp.Server(params)
    print(json.dumps({"url": server.listening_address}), flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
