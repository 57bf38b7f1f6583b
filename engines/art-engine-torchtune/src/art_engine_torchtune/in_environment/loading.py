"""The factory that the worker is given: a base model and its tokenizer, as a policy that has proved itself.

Joins `base_model`, `policy` and `proof`; knows how none of them does its part.
"""

from __future__ import annotations

from art_core.errors import UnknownArgument
from art_training_kit.device_choice import compute_device, compute_dtype
from art_training_kit.policy import PolicyRequest

from .base_model import build_base
from .policy import TorchtunePolicy
from .proof import prove


def load_policy(request: PolicyRequest) -> TorchtunePolicy:
    """Read the base model from its folder.

    Raises ValueError for one that torchtune has no builder for, ProofFailed when what it computes isn't what it should.
    """
    from transformers import AutoConfig, AutoTokenizer

    for name in request.init_args or {}:
        raise UnknownArgument(name, where="init_args of the torchtune training engine", known=())
    device = compute_device(request.device)
    dtype = compute_dtype(device, request.dtype)
    config = AutoConfig.from_pretrained(request.base_model)
    # A packed row may be longer than any of the sequences in it.
    max_seq_len = max(request.max_seq_length, config.max_position_embeddings)
    base = build_base(request.base_model, config=config, device=device, dtype=dtype, max_seq_len=max_seq_len)
    tokenizer = AutoTokenizer.from_pretrained(request.base_model)
    policy = TorchtunePolicy(base, tokenizer, str(request.base_model), request.gradient_checkpointing)
    prove(policy, request.base_model)
    return policy
