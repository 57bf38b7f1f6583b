"""Holds a policy against what it should compute, on the device that it will train on, before its first job.

Unsloth goes wrong in silence: in training it drops a mask that it isn't told to keep, and takes restarting positions
for other documents. So it is measured, with a random adapter on every projection: a short tree against its sequences
one by one; the tree's logits and gradients against transformers and PEFT in a process of their own (`stock`); the
adapter, saved and read again. Knows the bounds.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from art_core.errors import ArtError
from art_engine_kit.adapter_config import AdapterConfig
from art_engine_kit.adapter_files import read_adapter, write_adapter
from art_engine_kit.base_shapes import SEVEN_PROJECTIONS, linear_shapes, weight_files
from art_training_kit.packing import PackedRow, pack_rows
from art_training_kit.rows import TokenRow

from ..declared import Settings
from .policy import UnslothPolicy, tree_mask
from .stock import loss

_log = logging.getLogger(__name__)

# Root and two levels of two branches, in tokens.
_LEVELS: Final = (8, 5, 4)
# Tokens after the root are this far from it, where a wrong rotation shows; nearer where the base has fewer positions.
_FAR: Final = 6000
# Larger bases are compared by some layers: they are held a second time, in fp32. Those in 16 bit are too, since
# rounding grows with each layer and would hide mistakes.
_WHOLE_UP_TO_BYTES: Final = 2 << 30
_SOME_LAYERS: Final = 4
_STOCK_LIMIT_S: Final = 300.0
# How far apart two results may be: the length of their difference over that of one. In fp32 from transformers and PEFT,
# and in either dtype between a tree and its sequences.
BOUNDS: Final[Mapping[torch.dtype, float]] = {torch.float32: 2e-4, torch.bfloat16: 0.05}
# In 16 bit: so many times as far from fp32 as transformers and PEFT are themselves in that dtype.
TIMES_STOCK: Final = 2.0


class ProofFailed(ArtError, RuntimeError):
    """A policy that doesn't compute what it should. Nothing is trained with it."""


@dataclass
class Expected:
    """The question that transformers and PEFT are asked meanwhile, and their answer once it is waited for."""

    process: subprocess.Popen[bytes]
    folder: Path
    rows: list[TokenRow]
    tree: PackedRow
    layers: int

    @property
    def adapter(self) -> Path:
        """The random adapter that was asked about."""
        return self.folder / "in"

    def answer(self) -> dict[str, Tensor]:
        """By name, such as exact.logits. Raises ProofFailed when there is none."""
        try:
            code = self.process.wait(_STOCK_LIMIT_S)
        except subprocess.TimeoutExpired:
            code = None
        if code != 0:
            raise ProofFailed(
                "transformers and PEFT, which Unsloth is held against, "
                + (f"gave no answer within {_STOCK_LIMIT_S:g} s" if code is None else f"ended with {code}")
                + "; the lines before say why. Nothing was trained."
            )
        from safetensors.torch import load_file

        return load_file(self.folder / "stock.safetensors")


@contextmanager
def expecting(folder: Path, *, device: torch.device, dtype: torch.dtype, settings: Settings) -> Iterator[Expected]:
    """Start asking transformers and PEFT about the base model in `folder`, in a process that ends with the block."""
    rng = np.random.default_rng(0)
    shapes = linear_shapes(folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rows = _token_rows(shapes["model.embed_tokens"][0], rng)
    (tree,) = pack_rows(rows, sum(map(len, rows)))
    far = max(0, min(_FAR, config["max_position_embeddings"] - sum(_LEVELS)))
    size = sum(file.stat().st_size for file in weight_files(folder))
    layers: int = config["num_hidden_layers"]
    if size > _WHOLE_UP_TO_BYTES or dtype != torch.float32:
        layers = min(_SOME_LAYERS, layers)
    with tempfile.TemporaryDirectory(prefix="art-proof-") as temporary:
        expected_folder = Path(temporary)
        positions = tree.position_ids + far * (tree.position_ids >= _LEVELS[0])
        request = {
            "base_model": str(folder),
            "adapter": str(_random_adapter(shapes, expected_folder / "in", rng)),
            "out": str(expected_folder / "stock.safetensors"),
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "load_in_4bit": settings.load_in_4bit,
            "layers": layers,
            "token_ids": tree.token_ids.tolist(),
            "position_ids": positions.tolist(),
            "mask": tree_mask(tree, torch.device("cpu")).tolist(),
        }
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("stock.py"))], stdin=subprocess.PIPE, stdout=sys.stderr
        )
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            yield Expected(process, expected_folder, rows, replace(tree, position_ids=positions), layers)
        finally:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


def prove(policy: UnslothPolicy, expected: Expected, folder: Path) -> None:
    """Raise ProofFailed, with the numbers, unless `policy` computes the base model in `folder` and adapters on it.

    Leaves the base alone in it, without an adapter.
    """
    began = time.monotonic()
    name = str(policy.dtype).removeprefix("torch.")
    again = expected.folder / "out"
    again.mkdir()
    policy.load_adapter(expected.adapter)
    policy.save_adapter(again)
    _require_same(expected.adapter, again)
    bound = BOUNDS[policy.dtype]
    with policy.first_layers(expected.layers):
        alone = _tree_apart(policy, expected)
        ours = _computed(policy, expected.tree)
    policy.drop_adapter()
    answer = expected.answer()
    exact, stock = _part(answer, "exact."), _part(answer, "stock.")
    found, failed = [f"a tree is apart from its sequences by {alone:.2g}, where {bound:g} is taken"], alone > bound
    for what, measure in (("logits", _logits_apart), ("gradients", _gradients_apart)):
        apart = measure(ours, exact)
        taken = max(BOUNDS[torch.float32], TIMES_STOCK * measure(stock, exact) if stock else 0.0)
        found.append(f"its {what} from those of transformers and PEFT in fp32 by {apart:.2g}, where {taken:.2g} is")
        failed |= not apart <= taken
    said = f"in {name}, of {expected.layers} of {policy.num_layers} layers: {'; '.join(found)}"
    if failed:
        raise ProofFailed(
            f"Unsloth does not compute the base model in {folder} as it is meant, {said}. Nothing was trained. Train it"
            " with engine torch: pip install art-engine-torch."
        )
    _log.info("proved in %.1f s, %s; an adapter came back as it was", time.monotonic() - began, said)


def _random_adapter(shapes: Mapping[str, tuple[int, int]], folder: Path, rng: np.random.Generator) -> Path:
    """About as strong as the base's own weights, so that what it gets wrong shows."""
    config = AdapterConfig(r=4, lora_alpha=6, target_modules=SEVEN_PROJECTIONS)
    pairs = {}
    for module in config.modules(shapes):
        out_features, in_features = shapes[module]
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
        raise ProofFailed("Unsloth does not give back an adapter as it was loaded. Nothing was trained.")


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


def _tree_apart(policy: UnslothPolicy, expected: Expected) -> float:
    """The tree's hidden states, at its far positions, from those of its sequences at theirs."""
    tree, rows = expected.tree, expected.rows
    mask = tree_mask(tree, policy.device)
    last = tree.parents[tree.target_parent[tree.entry_target]]
    found = []
    with torch.no_grad():
        together = policy.hidden_states(tree)
        for position, trajectory in zip(last.tolist(), tree.entry_trajectory.tolist(), strict=True):
            (alone,) = pack_rows([rows[trajectory]], len(rows[trajectory]))
            path = mask[position]
            alone = replace(alone, position_ids=tree.position_ids[path.cpu().numpy()])
            found.append(_apart(together[path], policy.hidden_states(alone)))
    return max(found)


def _computed(policy: UnslothPolicy, tree: PackedRow) -> dict[str, Tensor]:
    logits = (policy.hidden_states(tree) @ policy.output_weight.T).float()
    ids = torch.from_numpy(tree.token_ids).to(policy.device)
    loss(logits, ids).backward()  # type: ignore[no-untyped-call]
    # Those of the first layers alone have any.
    gradients = {name: p.grad.float() for name, p in policy.adapter_parameters().items() if p.grad is not None}
    return {"logits": logits.detach(), **{f"gradient.{name}": gradient for name, gradient in gradients.items()}}


def _part(answer: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in answer.items() if name.startswith(prefix)}


def _logits_apart(ours: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    # What is the same for all tokens changes no probability.
    one, other = (logits - logits.mean(-1, keepdim=True) for logits in (ours["logits"].cpu(), exact["logits"]))
    return _apart(one, other)


def _gradients_apart(ours: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """The root of the mean square over the adapter's matrices, so that none is too small to be seen."""
    if ours.keys() != exact.keys():
        return float("inf")
    each = [_apart(ours[name].cpu(), exact[name]) for name in exact if name != "logits"]
    return float(np.sqrt(np.mean(np.square(each))))


def _apart(one: Tensor, other: Tensor) -> float:
    """The length of the difference over that of `other`; infinite where a number isn't finite, or shapes differ."""
    if one.shape != other.shape:
        return float("inf")
    found = float((one.float() - other.float()).norm() / other.float().norm())
    return found if np.isfinite(found) else float("inf")
