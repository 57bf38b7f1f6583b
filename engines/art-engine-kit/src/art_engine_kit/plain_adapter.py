"""The form of an adapter that every inference server computes alike: one rank, one scale alpha / r, whole groups.

SGLang serves alpha / r whatever rsLoRA or alpha_pattern say, breaks on a rank of its own for one module, and on an
adapter for v_proj without q_proj; older servers of other kinds do the like. So servers are handed a copy in which the
scale is multiplied into B, ranks are filled up with zeros, and what a server fuses is there together. The adapter's own
folder stays as it was trained. Knows files; knows no server.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .adapter_config import AdapterConfig, read_adapter_config
from .adapter_files import Adapter, Float32, read_adapter, weights_file, write_adapter
from .base_shapes import LinearShapes
from .canary import CANARY
from .checkpoint_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS

# Layers that servers compute as one matrix. An adapter for one of them gets zeros for its siblings.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def is_plain(config: AdapterConfig, base_shapes: LinearShapes) -> bool:
    """True for an adapter that every server computes alike as it is. Reads no weights."""
    modules = config.modules(base_shapes)
    return (
        not isinstance(config.target_modules, str)
        and all(config.rank(module) == config.r for module in modules)
        and all(config.scaling(module) == config.lora_alpha / config.r for module in modules)
        and len(_with_siblings(modules, base_shapes)) == len(modules)
    )


def plain_adapter(folder: Path, base_shapes: LinearShapes, copy: Path) -> Path:
    """The folder to hand to a server for the adapter in `folder`: itself where it is plain, else `copy`, written anew.

    The adapter was judged before. Where the config alone has to change the weights are linked, not copied; the canary
    is linked beside them. Call it off the event loop.
    """
    config = read_adapter_config(folder)
    if is_plain(config, base_shapes):
        return folder
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    modules = config.modules(base_shapes)
    whole = _with_siblings(modules, base_shapes)
    ranks, scales = {config.rank(m) for m in modules}, {config.scaling(m) for m in modules}
    weights = weights_file(folder)
    if len(ranks) == len(scales) == 1 and len(whole) == len(modules) and weights.name == ADAPTER_WEIGHTS:
        (rank,), (scale,) = ranks, scales
        _plain_config(config, whole, rank, alpha=scale * rank).write(copy)
        _link(weights, copy / ADAPTER_WEIGHTS)
    else:
        rank = max(ranks)
        adapter = read_adapter(folder)
        pairs = {module: _padded(adapter, module, base_shapes[module], rank) for module in whole}
        write_adapter(copy, _plain_config(config, whole, rank, alpha=rank), pairs)
    link_canary(folder, copy)
    return copy


def link_adapter(folder: Path, copy: Path) -> None:
    """Make `copy` a folder with an adapter's two files that stay there when `folder` is renamed or goes."""
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    for file in (folder / ADAPTER_CONFIG, weights_file(folder)):
        _link(file, copy / file.name)


def link_canary(folder: Path, copy: Path) -> None:
    """Put an adapter's canary, if it has one, beside a copy that has none yet."""
    if (folder / CANARY).exists() and not (copy / CANARY).exists():
        _link(folder / CANARY, copy / CANARY)


def _plain_config(config: AdapterConfig, modules: Iterable[str], rank: int, *, alpha: float) -> AdapterConfig:
    # Whole paths, so that it is these modules and no others; servers that look at the names look at their ends.
    return AdapterConfig(
        base_model_name_or_path=config.base_model_name_or_path,
        r=rank,
        lora_alpha=alpha,
        target_modules=tuple(modules),
    )


def _padded(adapter: Adapter, module: str, shape: tuple[int, int], rank: int) -> tuple[Float32, Float32]:
    """A and B at `rank`, with the scale in B: rows of zeros in A and columns of zeros in B change nothing."""
    out_features, in_features = shape
    a, b = np.zeros((rank, in_features), np.float32), np.zeros((out_features, rank), np.float32)
    pair = adapter.pairs.get(module)
    if pair is not None:
        own = adapter.config.rank(module)
        a[:own] = pair.a.float32()
        b[:, :own] = pair.b.float32() * np.float32(adapter.config.scaling(module))
    return a, b


def _with_siblings(modules: Iterable[str], base_shapes: LinearShapes) -> list[str]:
    """The modules, and those that a server computes together with one of them."""
    wanted = set(modules)
    for module in list(wanted):
        parent, _, name = module.rpartition(".")
        for group in FUSED:
            if name in group:
                wanted |= {f"{parent}.{sibling}" for sibling in group} & base_shapes.keys()
    return [module for module in base_shapes if module in wanted]


def _link(file: Path, there: Path) -> None:
    try:
        os.link(file, there)
    except OSError:
        # Some file systems have no links.
        shutil.copyfile(file, there)
