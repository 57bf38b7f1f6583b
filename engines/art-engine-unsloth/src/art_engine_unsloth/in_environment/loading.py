"""The factory that the worker is given: a base model and its tokenizer, as a policy that has proved itself.

Joins `base_model`, `policy` and `proof`; knows how none of them does its part.
"""

from __future__ import annotations

import logging

from art_core.errors import UnknownArgument
from art_training_kit.device_choice import compute_device, compute_dtype
from art_training_kit.policy import PolicyRequest

from ..declared import INIT_ARGS, Settings
from .base_model import import_unsloth, load_base, require_family
from .policy import UnslothPolicy
from .proof import expecting, prove

_log = logging.getLogger(__name__)


def load_policy(request: PolicyRequest) -> UnslothPolicy:
    """Read the base model from its folder.

    Raises ValueError for one that isn't trained with Unsloth, ProofFailed when what it computes isn't what it should.
    """
    for name in request.init_args or {}:
        if name not in INIT_ARGS:
            raise UnknownArgument(name, where="init_args of the unsloth training engine", known=INIT_ARGS)
    device = compute_device(request.device)
    dtype = compute_dtype(device, request.dtype)
    on_gpu = device.type == "cuda"
    settings = Settings.of(request.init_args or {}, worker=request.gradient_checkpointing, on_gpu=on_gpu)
    folder = request.base_model
    require_family(folder)
    with expecting(folder, device=device, dtype=dtype, settings=settings) as expected:
        # It wants to be imported before transformers.
        import_unsloth()
        from transformers import AutoConfig, AutoTokenizer

        config = AutoConfig.from_pretrained(folder)
        policy = UnslothPolicy(
            lambda: load_base(folder, config, device=device, dtype=dtype, settings=settings),
            AutoTokenizer.from_pretrained(folder),
            str(folder),
            dtype,
            settings,
        )
        prove(policy, expected, folder)
    _log.info(
        "attention over a packed row takes torch's own kernel and a mask of all pairs of its tokens, which is right and"
        " slower: Unsloth's kernels for packed rows take no tree. A row of 8,192 tokens has one of %d MiB. Prefixes are"
        " shared all the same",
        policy.attention_mask_bytes(8192) >> 20,
    )
    return policy
