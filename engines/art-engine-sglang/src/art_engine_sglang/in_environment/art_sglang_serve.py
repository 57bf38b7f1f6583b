"""Runs SGLang's server in its own environment, which has nothing of ART but this file.

The API key comes by the environment, since SGLang itself takes it only in its command line, where every user of the
machine sees it; and it is kept out of the log, into which SGLang writes all of its settings. On a CPU it stands in for
what only builds for CUDA define. SGLang's own processes import this file again, so all of that reaches them too.
"""

import functools
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

KEY_VARIABLE = "ART_SGLANG_API_KEY"
# Operators are defined for as long as the library object lives that defined them.
_kept: list[Any] = []


def _keep_out_of_logs(secret: str) -> None:
    make = logging.getLogRecordFactory()

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        text = made.getMessage()
        if secret in text:
            made.msg, made.args = text.replace(secret, "***"), ()
        return made

    logging.setLogRecordFactory(record)


def _stand_in_for_cuda() -> None:
    import torch

    # torchvision's own library is linked to CUDA and doesn't load; SGLang only needs these operators to be defined.
    torchvision: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    _kept.append(torchvision)
    for name in ("nms", "qnms"):
        torchvision.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

    # SGLang's LoRA code asks for pinned host memory without looking whether there is a device to pin it for.
    def unpinned(make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def made(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("pin_memory", None)
            return make(*args, **kwargs)

        return made

    for name in ("tensor", "empty", "zeros", "ones", "full", "arange"):
        setattr(torch, name, unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *_args, **_kwargs: self  # type: ignore[method-assign]


def _with_dtype(arguments: list[str]) -> list[str]:
    """What dtype auto means on this CPU: bfloat16 only where it is multiplied in hardware, else it is far slower."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE") != "1" or "--dtype" not in arguments:
        return arguments
    place = arguments.index("--dtype") + 1
    if arguments[place] != "auto":
        return arguments
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        flags = next((line for line in file if line.startswith("flags")), "").split()
    chosen = "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"
    print(f"art: dtype auto is {chosen} on this CPU", flush=True)
    return [*arguments[:place], chosen, *arguments[place + 1 :]]


def _say_context_as_others_do() -> None:
    """Harnesses know that a conversation has outgrown the context by these words, which SGLang says only of part."""
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    check = TokenizerManager._validate_one_request

    def checked(self: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return check(self, *arguments, **options)
        except ValueError as error:
            if "longer than the model's context length" not in str(error):
                raise
            raise ValueError(f"This model's maximum context length is {self.context_len} tokens. {error}") from None

    TokenizerManager._validate_one_request = checked


if os.environ.get(KEY_VARIABLE):
    _keep_out_of_logs(os.environ[KEY_VARIABLE])
if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
    _stand_in_for_cuda()

if __name__ != "__main__":
    # Who stops the server asks its whole group. SGLang takes a scheduler that leaves by itself for a crash and kills
    # everything in mid-answer; left alone, the server drains its requests first and ends the others itself.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

if __name__ == "__main__":
    if "--probe" in sys.argv:
        import sglang
        import sglang.srt.entrypoints.http_server  # noqa: F401  (whether it can be)

        print(sglang.__version__)
        sys.exit(0)
    import runpy

    if "ART_HERMES_CALLS" in os.environ:
        import art_sglang_tools  # type: ignore[import-not-found,unused-ignore]

        art_sglang_tools.install()
    _say_context_as_others_do()
    sys.argv[1:] = _with_dtype(sys.argv[1:])
    if os.environ.get(KEY_VARIABLE):
        # In one word, since a key may begin with a dash.
        sys.argv.append(f"--api-key={os.environ[KEY_VARIABLE]}")
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=False)
