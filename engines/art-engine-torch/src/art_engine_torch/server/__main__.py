"""The inference server's process: reads its command line, loads the model behind an open port, ends cleanly.

`python -m art_engine_torch.server --model FOLDER --served-model-name NAME --port N`. The API key comes from the
variable ART_TORCH_API_KEY, never from the command line. /health answers 503 until the model is loaded.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from types import FrameType
from typing import Final

import uvicorn

from art_training_kit.allocator import keep_freed_memory

from ..names import API_KEY_VARIABLE
from .app import InferenceApp
from .engine import InferenceEngineThread
from .prompts import Prompts
from .scheduler import Scheduler
from .vocabulary import Vocabulary

STOP_TIMEOUT_S: Final = 10.0
logger = logging.getLogger("art_engine_torch")


def arguments() -> argparse.ArgumentParser:
    """The command line. The engine description builds its command from the same names."""
    parser = argparse.ArgumentParser("art_engine_torch.server", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--model", type=Path, required=True, help="folder with config, safetensors weights and tokenizer"
    )
    parser.add_argument("--served-model-name", required=True, help="the name that the base model answers to")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument(
        "--max-model-len", type=int, help="tokens of prompt and answer together; default: the model's own"
    )
    parser.add_argument("--max-adapters", type=int, default=8, help="LoRA adapters loaded at once")
    parser.add_argument("--max-lora-rank", type=int, default=64)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, help="CPU threads for one step; default: torch's own choice")
    parser.add_argument(
        "--max-num-seqs", type=int, help="sequences running at once; default 128 on a CPU, 256 on a GPU"
    )
    parser.add_argument("--max-batch-tokens", type=int, help="rows of one step; default 512 on a CPU, 8192 on a GPU")
    parser.add_argument(
        "--kv-cache-gb", type=float, help="memory for running sequences; default: a part of what is free"
    )
    parser.add_argument(
        "--prefix-cache-gb", type=float, help="memory for kept prefixes; default: a part of what is free"
    )
    parser.add_argument("--chat-template", type=Path, help="a Jinja file used instead of the model's own template")
    parser.add_argument(
        "--trust-request-chat-template", action="store_true", help="render templates that requests bring along"
    )
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return parser


class _Server(uvicorn.Server):
    """Ends unfinished requests at once on a signal, where uvicorn alone would wait for them."""

    engine: InferenceEngineThread

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.engine.request_stop()
        super().handle_exit(sig, frame)


def main(argv: list[str] | None = None) -> int:
    """Serves until a signal (0) or until the engine fails (1)."""
    options = arguments().parse_args(argv)
    keep_freed_memory()
    logging.basicConfig(level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    vocabularies: list[Vocabulary] = []
    failures: list[BaseException] = []

    def build() -> Scheduler:
        from .loading import build_scheduler

        scheduler = build_scheduler(options)
        vocabularies.append(Vocabulary(options.model, size=scheduler.decoder.shape.vocab))
        return scheduler

    def failed(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    engine = InferenceEngineThread(
        build,
        served_name=options.served_model_name,
        max_adapters=options.max_adapters,
        max_lora_rank=options.max_lora_rank,
        on_failure=failed,
    )
    prompts = Prompts(
        options.model,
        chat_template=options.chat_template,
        trust_templates=options.trust_request_chat_template,
        on_failure=failed,
    )
    app = InferenceApp(
        engine,
        lambda: vocabularies[0],
        prompts,
        served_name=options.served_model_name,
        api_key=os.environ.pop(API_KEY_VARIABLE, None) or None,
    )
    config = uvicorn.Config(
        app.asgi,
        host=options.host,
        port=options.port,
        # Not whichever loop another package happened to install.
        loop="asyncio",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=3,
        timeout_keep_alive=75,
        backlog=4096,
    )
    server = _Server(config)
    server.engine = engine
    engine.start()
    try:
        server.run()
    except SystemExit:  # uvicorn's way of saying that it could not listen; it has logged why
        engine.stop(STOP_TIMEOUT_S)
        return 1
    engine.stop(STOP_TIMEOUT_S)
    if failures:
        print(f"art_engine_torch.server ended: {type(failures[0]).__name__}: {failures[0]}", file=sys.stderr)
        return 1
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
