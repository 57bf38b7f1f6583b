"""Stands in for the CPU build of sgl-kernel, which the package index doesn't have.

Holds only the names that SGLang imports on the plain CPU path; calling one says what is missing.
"""

from collections.abc import Callable
from typing import NoReturn

__version__ = "0.0.0+art"

_NAMES = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_draft_decode_metadata_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
)


def _missing(name: str) -> Callable[..., NoReturn]:
    def kernel(*_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name} has no CPU build on the package index, and what you asked of SGLang needs it. Leave out"
            " speculative decoding and other special modes, or use a GPU."
        )

    kernel.__name__ = name
    return kernel


globals().update({name: _missing(name) for name in _NAMES})
