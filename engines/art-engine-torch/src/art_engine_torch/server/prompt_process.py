"""The process that writes prompts: it renders chat templates and tokenizes, and what never ends there ends alone.

Reads jobs from stdin and writes results to stdout, one after the other, as frames of JSON. A child does the work within
a limit of CPU time and of memory that the system itself enforces; when one is ended by it, the next is forked from this
process, which has the tokenizer ready. Knows no HTTP, no engine and, to stay small, no torch.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import orjson

from art_core.errors import InvalidRequest
from art_engine_kit.chat_rendering import ChatRenderer

# Of one prompt. What a long one takes is well below a second.
CPU_LIMIT_S: Final = 5.0
MEMORY_LIMIT: Final = 1 << 30
# What stands before the content of a frame.
LENGTH: Final = struct.Struct("<Q")
JSON = dict[str, Any]


def framed(content: bytes) -> bytes:
    """A frame with this content."""
    return LENGTH.pack(len(content)) + content


def write_frame(file: BinaryIO, content: bytes) -> None:
    """One frame, at once. Raises OSError when the reader is gone."""
    file.write(framed(content))
    file.flush()


def read_frame(file: BinaryIO) -> bytes | None:
    """The next frame; None when the writer is gone, in the middle of one too."""
    length = file.read(LENGTH.size)
    if len(length) < LENGTH.size:
        return None
    size = LENGTH.unpack(length)[0]
    content = file.read(size)
    return content if len(content) == size else None


class PromptWriter:
    """A tokenizer with its chat template, which does jobs.

    A job has `most`, the number of characters that no prompt of this context can exceed, and either `texts` to tokenize
    or `messages` to render first. Its result has `tokens`, one list of ids for each text; or `too_long`, the number of
    characters; or `error` and `param`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._own = ChatRenderer(tokenizer)

    def do(self, job: JSON) -> JSON:
        """The result of a job."""
        try:
            texts = job["texts"] if "texts" in job else [self._render(job)]
            longest = max(map(len, texts))
            if longest > job["most"]:
                return {"too_long": longest}
            return {"tokens": [self._ids(text, special=job["special"]) for text in texts]}
        except InvalidRequest as error:
            return {"error": str(error), "param": error.param}
        except (MemoryError, RecursionError) as error:
            return {
                "error": f"messages: writing the prompt took too much ({type(error).__name__}).",
                "param": "messages",
            }

    def _render(self, job: JSON) -> str:
        template = job["template"]
        renderer = self._own if template is None else ChatRenderer(self._tokenizer, template)
        return renderer.text(
            job["messages"],
            tools=job["tools"],
            arguments=job["arguments"],
            generate=job["generate"],
            continue_final=job["continue_final"],
        )

    def _ids(self, text: str, *, special: bool) -> list[int]:
        encoded = self._tokenizer(text, add_special_tokens=special, return_attention_mask=False)
        return list(encoded["input_ids"])


@dataclass(frozen=True)
class _Child:
    pid: int
    jobs: BinaryIO
    results: BinaryIO

    def end(self) -> str:
        """Waits for its end, and says how it came."""
        self.jobs.close()
        self.results.close()
        _, status = os.waitpid(self.pid, 0)
        return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "an end of its own"


def serve(do: Callable[[JSON], JSON], jobs: BinaryIO, results: BinaryIO) -> None:
    """Does jobs until there are no more, each in a child. A job that ends its child has the result `ended`, which says
    how.
    """
    child: _Child | None = None
    while (job := read_frame(jobs)) is not None:
        if child is None:
            child = _fork(do, jobs)
        try:
            write_frame(child.jobs, job)
            result = read_frame(child.results)
        except OSError:
            result = None
        if result is None:
            result = orjson.dumps({"ended": child.end()})
            child = None
        write_frame(results, result)
    if child is not None:
        child.end()


def _fork(do: Callable[[JSON], JSON], inherited: BinaryIO) -> _Child:
    job_end, jobs = os.pipe()
    results, result_end = os.pipe()
    pid = os.fork()
    if pid:
        os.close(job_end)
        os.close(result_end)
        return _Child(pid, os.fdopen(jobs, "wb"), os.fdopen(results, "rb"))
    try:
        os.close(jobs)
        os.close(results)
        os.close(inherited.fileno())
        _limit_memory()
        with os.fdopen(job_end, "rb") as mine, os.fdopen(result_end, "wb") as out:
            while (job := read_frame(mine)) is not None:
                # The system ends this process when the time is over, whatever it is at.
                signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
                result = orjson.dumps(do(orjson.loads(job)))
                signal.setitimer(signal.ITIMER_PROF, 0.0)
                write_frame(out, result)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _limit_memory() -> None:
    pages = Path("/proc/self/statm")
    if pages.exists():
        used = int(pages.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_LIMIT, used + MEMORY_LIMIT))


def main(argv: Sequence[str] | None = None) -> int:
    """Says {"ready": true} once the tokenizer is loaded, then serves until stdin ends."""
    parser = argparse.ArgumentParser("art_engine_torch.server.prompt_process", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--chat-template", type=Path)
    options = parser.parse_args(argv)
    # It ends when the server does, which a signal to the whole group must not come before.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    results = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no result
    # transformers knows how to do with tokenizers alone; torch would take seconds and most of the memory.
    sys.modules["torch"] = None  # type: ignore[assignment]
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    if options.chat_template is not None:
        tokenizer.chat_template = options.chat_template.read_text(encoding="utf-8")
    write_frame(results, b'{"ready": true}')
    gc.freeze()
    serve(PromptWriter(tokenizer).do, sys.stdin.buffer, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
