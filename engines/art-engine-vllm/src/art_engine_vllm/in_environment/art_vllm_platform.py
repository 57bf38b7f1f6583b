"""vLLM's platform for CPUs, with LoRA products of our own: a platform plugin, the way vLLM has for such a change.

The folder `art_vllm.dist-info` beside this file is where vLLM finds it. vLLM asks while it imports itself, so the class
that it is to use is named here and imported later.
"""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform


class CpuPlatformWithLora(CpuPlatform):  # type: ignore[misc]
    """See `vllm.platforms.interface.Platform`."""

    @classmethod
    def get_punica_wrapper(cls) -> str:
        """Where the class is that computes LoRA."""
        return "art_vllm_lora.PunicaWrapperByAdapter"


def platform() -> str | None:
    """The platform to use: ours in place of vLLM's plain one for CPUs; None on a GPU and where zentorch has its own."""
    from vllm.platforms import cpu_platform_plugin

    plain = cpu_platform_plugin() == f"{CpuPlatform.__module__}.{CpuPlatform.__qualname__}"
    return f"{__name__}.{CpuPlatformWithLora.__qualname__}" if plain else None
