"""Runs the command `vllm` in vLLM's environment, which has nothing of ART but this folder.

What depends on the machine is decided here, where it can be looked at: the dtype that "auto" means on a CPU, and that a
machine of one core has none to spare.
"""

import os
import sys


def _fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; without, it is several times slower than float32."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        flags = next((line for line in file if line.startswith("flags")), "").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _with_dtype(arguments: list[str]) -> list[str]:
    from vllm.platforms import current_platform

    if "--dtype" not in arguments or not current_platform.is_cpu():
        return arguments
    place = arguments.index("--dtype") + 1
    if arguments[place] != "auto":
        return arguments
    chosen = "bfloat16" if _fast_bfloat16() else "float32"
    print(f"art: dtype auto is {chosen} on this CPU", flush=True)
    return [*arguments[:place], chosen, *arguments[place + 1 :]]


# vLLM's own processes import this file again, under another name.
if __name__ == "__main__":
    if len(os.sched_getaffinity(0)) == 1:
        # vLLM keeps a core free for its scheduler, which would leave none to compute on.
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    sys.argv[1:] = _with_dtype(sys.argv[1:])
    from vllm.entrypoints.cli.main import main

    main()
