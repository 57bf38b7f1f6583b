"""Holds a policy against what it should compute, on the device that it will train on, before its first job.

torchtune goes wrong in silence: a setting that it lacks, or rows in another order, give other numbers and no error. So
it is measured, with a random adapter on every projection: a short tree against its sequences one by one; the tree's
logits against transformers; the policy's dtype against fp32; the adapter, saved and read again. Knows the bounds.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from art_core.errors import ArtError
from art_engine_kit.adapter_config import AdapterConfig
from art_engine_kit.adapter_files import read_adapter, write_adapter
from art_engine_kit.base_shapes import SEVEN_PROJECTIONS, weight_files
from art_training_kit.packing import PackedRow, pack_rows
from art_training_kit.rows import TokenRow

from .base_model import INSTEAD
from .policy import TorchtunePolicy, tree_mask

_log = logging.getLogger(__name__)

# Root and two levels of two branches, in tokens.
_LEVELS: Final = (8, 5, 4)
# Tokens after the root are this far from it, where a wrong rotation shows; nearer where the base has fewer positions.
_FAR: Final = 6000
# Of a base with larger files only some layers are compared with transformers: they are held a second time, in fp32.
_WHOLE_UP_TO_BYTES: Final = 2 << 30
_SOME_LAYERS: Final = 4
# How far apart two results may be: the length of their difference over that of one. Within a dtype, with SmolLM2 and
# with tiny models, at most 8e-7 was seen in fp32 and 0.013 in bf16.
BOUNDS: Final[Mapping[torch.dtype, float]] = {torch.float32: 2e-4, torch.bfloat16: 0.05}
# The same weights and fp32 on both sides: SmolLM2's logits are apart from transformers' by 1.1e-5. With torchtune's own
# scale_factor it is 0.62, with another rope_base 0.57, with rows of lora_B in transformers' order 0.17, and with 1e-6
# where 1e-5 is the norms' epsilon 0.0019.
LOGITS_BOUND: Final = 2e-4


class ProofFailed(ArtError, RuntimeError):
    """A policy that doesn't compute what it should. Nothing is trained with it."""


def prove(policy: TorchtunePolicy, folder: Path) -> None:
    """Raise ProofFailed, with the numbers, unless `policy` computes the base model in `folder` and adapters on it.

    Leaves the base alone in it, without an adapter.
    """
    began = time.monotonic()
    dtype = policy.output_weight.dtype
    bound, name = BOUNDS[dtype], str(dtype).removeprefix("torch.")
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="art-proof-") as temporary, torch.no_grad():
        adapter, again = _random_adapter(policy, Path(temporary) / "in", rng), Path(temporary) / "out"
        policy.load_adapter(adapter)
        again.mkdir()
        policy.save_adapter(again)
        _require_same(adapter, again)
        rows = _token_rows(policy.vocabulary_size, rng)
        (tree,) = pack_rows(rows, sum(map(len, rows)))
        alone = _tree_apart(policy, tree, rows)
        layers, logits = _logits_apart(policy, folder, adapter, tree)
        rounded = _rounding_apart(policy, tree)
        policy.drop_adapter()
    found = (
        f"a tree is apart from its sequences by {alone:.2g} and {name} from fp32 by {rounded:.2g}, where {bound:g} is"
        f" taken; {layers} of {policy.num_layers} layers are apart from transformers' by {logits:.2g} in fp32, where"
        f" {LOGITS_BOUND:g} is"
    )
    if not (max(alone, rounded) <= bound and logits <= LOGITS_BOUND):
        raise ProofFailed(
            f"torchtune does not compute the base model in {folder} as it is meant: {found}. Nothing was trained."
            f" {INSTEAD}"
        )
    _log.info("proved in %.1f s: %s; an adapter came back as it was", time.monotonic() - began, found)


def _random_adapter(policy: TorchtunePolicy, folder: Path, rng: np.random.Generator) -> Path:
    """About as strong as the base's own weights, so that what it gets wrong shows."""
    config = AdapterConfig(r=4, lora_alpha=6, target_modules=SEVEN_PROJECTIONS)
    pairs = {}
    for module, (out_features, in_features) in policy.projection_shapes.items():
        a = rng.standard_normal((4, in_features), dtype=np.float32) / np.float32(in_features**0.5)
        b = rng.standard_normal((out_features, 4), dtype=np.float32) * np.float32(0.1)
        pairs[module] = (a, b)
    folder.mkdir()
    write_adapter(folder, config, pairs)
    return folder


def _require_same(before: Path, after: Path) -> None:
    ours, theirs = read_adapter(before), read_adapter(after)
    same = ours.config == theirs.config and ours.pairs.keys() == theirs.pairs.keys()
    if not same or any(
        not np.array_equal(one.float32(), other.float32())
        for module, pair in ours.pairs.items()
        for one, other in zip(pair, theirs.pairs[module], strict=True)
    ):
        raise ProofFailed("torchtune does not give back an adapter as it was loaded. Nothing was trained.")


def _token_rows(vocabulary: int, rng: np.random.Generator) -> list[TokenRow]:
    """The tree's four sequences, each with its last token as the one to predict."""
    root, middle, leaf = _LEVELS
    shared = rng.integers(0, vocabulary, root)
    branches = [np.concatenate([shared, rng.integers(0, vocabulary, middle)]) for _ in range(2)]
    sequences = [np.concatenate([branch, rng.integers(0, vocabulary, leaf)]) for branch in branches for _ in range(2)]
    return [
        TokenRow(s.astype(np.int32), np.array([len(s) - 1], np.int32), np.zeros(1, np.float32), trajectory)
        for trajectory, s in enumerate(sequences)
    ]


def _tree_apart(policy: TorchtunePolicy, tree: PackedRow, rows: list[TokenRow]) -> float:
    together = policy.hidden_states(tree)
    mask = tree_mask(tree, policy.device)
    last = tree.parents[tree.target_parent[tree.entry_target]]
    found = []
    for position, trajectory in zip(last.tolist(), tree.entry_trajectory.tolist(), strict=True):
        (alone,) = pack_rows([rows[trajectory]], len(rows[trajectory]))
        found.append(_apart(together[mask[position]], policy.hidden_states(alone)))
    return max(found)


def _logits_apart(policy: TorchtunePolicy, folder: Path, adapter: Path, tree: PackedRow) -> tuple[int, float]:
    size = sum(file.stat().st_size for file in weight_files(folder))
    layers = policy.num_layers if size <= _WHOLE_UP_TO_BYTES else min(_SOME_LAYERS, policy.num_layers)
    far = max(0, min(_FAR, policy.max_length - sum(_LEVELS)))
    tree = replace(tree, position_ids=tree.position_ids + far * (tree.position_ids >= _LEVELS[0]))
    with policy.first_layers(layers), policy.in_float32():
        ours = policy.hidden_states(tree) @ policy.output_weight.float().T
    theirs = _logits_of_transformers(folder, policy.output_weight.dtype, adapter, layers, tree, policy.device)
    # What is the same for all tokens changes no probability.
    return layers, _apart(ours - ours.mean(-1, keepdim=True), theirs - theirs.mean(-1, keepdim=True))


def _rounding_apart(policy: TorchtunePolicy, tree: PackedRow) -> float:
    """Of few layers, since rounding grows with each: with all of them it would hide mistakes."""
    with policy.first_layers(min(_SOME_LAYERS, policy.num_layers)):
        rounded = policy.hidden_states(tree)
        with policy.in_float32():
            return _apart(rounded, policy.hidden_states(tree))


def _logits_of_transformers(
    folder: Path, dtype: torch.dtype, adapter: Path, layers: int, tree: PackedRow, device: torch.device
) -> Tensor:
    """[S, vocabulary], of the first `layers` with the adapter merged into them, in fp32 of weights in `dtype`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    # It warns of the layers that are left out, which is meant, and shows a bar where none is seen.
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, num_hidden_layers=layers, attn_implementation="sdpa"
    )
    model.float().to(device).eval()
    read = read_adapter(adapter)
    for module, pair in read.pairs.items():
        if int(module.split(".")[2]) < layers:
            a, b = (torch.from_numpy(side.float32()).to(device) for side in pair)
            model.get_submodule(module).weight += read.config.scaling(module) * (b @ a)
    ids, positions = (torch.from_numpy(values)[None].to(device) for values in (tree.token_ids, tree.position_ids))
    mask = tree_mask(tree, device)[None, None]
    logits: Tensor = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits[0]
    return logits


def _apart(one: Tensor, other: Tensor) -> float:
    """The length of the difference over that of `other`; infinite where a number isn't finite."""
    found = float((one.float() - other.float()).norm() / other.float().norm())
    return found if np.isfinite(found) else float("inf")
