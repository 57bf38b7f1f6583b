"""Applies the LoRA adapters of a mixed batch, every row under its own adapter or under none.

Knows adapters only as matrices that fit the decoder's fused projections. Files and their checks are `lora_files`'
business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

# The decoder's fused projections, and the modules side by side in each.
FUSED: Final = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "out": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """One loaded adapter. `down[layer, module]` is [in, r], `up[layer, module]` [r, out], scaling folded in; `rank` is
    the largest r.

    `uid` is never used again in a process: a cache keyed by it cannot mix two adapters of one name.
    """

    name: str
    uid: int
    rank: int
    path: str
    down: dict[tuple[int, str], Tensor] = field(repr=False)
    up: dict[tuple[int, str], Tensor] = field(repr=False)


@dataclass(frozen=True)
class _Stack:
    """The adapters' matrices for one fused projection: columns of `down` and rows of `up`, module by module."""

    down: Tensor
    up: Tensor
    modules: int


class LoraStack:
    """Several adapters side by side, built once for a set of adapters and used until the set changes."""

    def __init__(
        self,
        adapters: Sequence[LoraAdapter],
        layers: int,
        widths: dict[str, tuple[int, int]],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.adapters = tuple(adapters)
        self._stacks: dict[tuple[int, str], _Stack] = {}
        rank = sum(adapter.rank for adapter in adapters)
        for layer in range(layers):
            for name, modules in FUSED.items():
                if not any((layer, module) in adapter.down for adapter in adapters for module in modules):
                    continue
                width = sum(widths[module][1] for module in modules)
                down = torch.zeros(widths[modules[0]][0], rank * len(modules), device=device, dtype=dtype)
                up = torch.zeros(rank * len(modules), width, device=device, dtype=dtype)
                row, column = 0, 0
                for module in modules:
                    end = column + widths[module][1]
                    for adapter in adapters:
                        if (layer, module) in adapter.down:
                            own = row + adapter.down[layer, module].shape[1]
                            down[:, row:own] = adapter.down[layer, module]
                            up[row:own, column:end] = adapter.up[layer, module]
                        row += adapter.rank
                    column = end
                self._stacks[layer, name] = _Stack(down, up, len(modules))
        ranks = torch.tensor([adapter.rank for adapter in adapters])
        owner = torch.arange(len(adapters)).repeat_interleave(ranks)
        # Row i opens the columns of adapter i and no others; the last row, for the base model, opens none.
        self._open = (owner[None, :] == torch.arange(len(adapters) + 1)[:, None]).to(device, dtype)

    def batch(self, owners: Sequence[int]) -> LoraBatch:
        """For a batch whose row i runs under `adapters[owners[i]]`, or under none where owners[i] is len(adapters)."""
        if len(self.adapters) == 1 and len(self.adapters) not in owners:
            return LoraBatch(self._stacks, None)
        rows = self._open[torch.tensor(owners, device=self._open.device)]
        return LoraBatch(self._stacks, {count: rows.repeat(1, count) for count in (1, 2, 3)})


class LoraBatch:
    """A stack together with the rows of one batch."""

    def __init__(self, stacks: dict[tuple[int, str], _Stack], masks: dict[int, Tensor] | None) -> None:
        self._stacks = stacks
        self._masks = masks

    def add(self, output: Tensor, x: Tensor, layer: int, projection: str) -> None:
        """Adds every row's low-rank update to `output` [rows, out], in place."""
        stack = self._stacks.get((layer, projection))
        if stack is None:
            return
        inner = torch.mm(x, stack.down)
        if self._masks is not None:
            inner *= self._masks[stack.modules]
        output.addmm_(inner, stack.up)
