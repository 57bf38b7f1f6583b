"""Attention over a packed row in which each token sees its ancestors and itself, exactly, and nothing is masked away.

On a CPU the row is a list of blocks: pieces that see themselves causally, and ranges that see a shared stretch whole.
Each block is one call of PyTorch's flash kernel; a query's partial results are merged by their log-sum-exps, and
backward runs the same blocks against the merged result. On CUDA it is one flex_attention call with the row's block
mask. Knows blocks and tensors; knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .packing import PackedRow

_TILE = 128
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True, eq=False)
class TreePlan:
    """What one packed row's attention needs, made once a row and used by every layer."""

    #: causal blocks of one length that follow each other: where they start, their length, how many they are
    runs: list[tuple[int, int, int]]
    cross: list[tuple[int, int, int, int]]
    block_mask: Any = None


def plan_attention(row: PackedRow, device: torch.device) -> TreePlan:
    """Make the plan of a packed row for `device`."""
    if device.type == "cpu":
        return TreePlan(_runs(row.causal_blocks.tolist()), [tuple(c) for c in row.cross_blocks.tolist()])
    return TreePlan([], [], block_mask(row, device))


def _runs(causal: list[list[int]]) -> list[tuple[int, int, int]]:
    runs: list[tuple[int, int, int]] = []
    for start, end in causal:
        first, length, count = runs[-1] if runs else (0, 0, 0)
        if count and (start, end - start) == (first + length * count, length):
            runs[-1] = (first, length, count + 1)
        else:
            runs.append((start, end - start, 1))
    return runs


def block_mask(row: PackedRow, device: torch.device) -> Any:
    """The row's mask for flex_attention, made from `tree_end` without looking at every pair of tokens.

    A tile is needed when any of its keys' descendants reach into its queries, and needs no mask when all of them
    reach beyond.
    """
    from torch.nn.attention.flex_attention import BlockMask

    tiles = -(-len(row) // _TILE)
    # Keys past the end of the row have no descendants.
    padded = np.zeros(tiles * _TILE, dtype=np.int32)
    padded[: len(row)] = row.tree_end
    reach = padded.reshape(tiles, _TILE)
    q, k = np.arange(tiles)[:, None], np.arange(tiles)[None, :]
    whole = (k < q) & (reach.min(1)[None, :] >= np.minimum((q + 1) * _TILE, len(row)))
    partly = ((k == q) | (k < q) & (reach.max(1)[None, :] > q * _TILE)) & ~whole
    tree_end = torch.from_numpy(padded).to(device)

    def sees(_batch: Tensor, _head: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        return (k_index <= q_index) & (q_index < tree_end[k_index])

    def listed(tile_matrix: npt.NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
        counts = tile_matrix.sum(1).astype(np.int32)
        indices = np.argsort(~tile_matrix, axis=1, kind="stable").astype(np.int32)
        return torch.from_numpy(counts)[None, None].to(device), torch.from_numpy(indices)[None, None].to(device)

    return BlockMask.from_kv_blocks(
        *listed(partly), *listed(whole), BLOCK_SIZE=_TILE, mask_mod=sees, seq_lengths=(len(row), len(row))
    )


def tree_attention(query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, scale: float) -> Tensor:
    """Attend within one packed row: query [1, heads, S, D], key and value [1, kv heads, S, D] → [1, heads, S, D].

    Fewer key-value heads than heads are shared by consecutive heads, as grouped-query attention has it.
    """
    if plan.block_mask is not None:
        return _flex()(query, key, value, block_mask=plan.block_mask, scale=scale, enable_gqa=True)  # type: ignore[no-any-return]
    result: Tensor = _BlockAttention.apply(query, key, value, plan, scale)  # type: ignore[no-untyped-call]
    return result


def _split(x: Tensor, count: int) -> Tensor:
    """[heads, count * length, D] → [count, heads, length, D]."""
    return x.view(x.shape[0], count, -1, x.shape[2]).transpose(0, 1)


@cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled it would build the whole S x S matrix; lengths differ row by row, hence dynamic.
    return torch.compile(flex_attention, dynamic=True)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, scale: float) -> Tensor:
        # [1, heads, S, D] laid out as [S, heads, D], which is what the model's projections make and take.
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        log_sum = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        for start, length, count in plan.runs:
            # One call for those of one length: short blocks cost more in calls than in arithmetic, and the kernel
            # shares out sequences and heads among the cores.
            part = slice(start, start + length * count)
            blocks = (_split(x[0, :, part], count) for x in (query, key, value))
            block, block_sum = _forward(*blocks, 0.0, True, scale=scale)
            out[0, :, part] = block.transpose(0, 1).flatten(1, 2)
            log_sum[0, :, part] = block_sum.transpose(0, 1).flatten(1, 2)
        for q_start, q_end, k_start, k_end in plan.cross:
            part, seen = slice(q_start, q_end), slice(k_start, k_end)
            block, block_sum = _forward(query[:, :, part], key[:, :, seen], value[:, :, seen], 0.0, False, scale=scale)
            # The share of the new block in the merged softmax is a sigmoid of the difference of log-sum-exps.
            share = torch.sigmoid(block_sum - log_sum[:, :, part])
            out[:, :, part].lerp_(block, share.to(out.dtype)[..., None])
            log_sum[:, :, part] = torch.logaddexp(log_sum[:, :, part], block_sum)
        ctx.save_for_backward(query, key, value, out, log_sum)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, log_sum = ctx.saved_tensors
        grads = [
            torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
            for x in (query, key, value)
        ]
        for start, length, count in ctx.plan.runs:
            part = slice(start, start + length * count)
            blocks = _backward(
                *(_split(x[0, :, part], count) for x in (grad, query, key, value, out)),
                _split(log_sum[0, :, part, None], count).squeeze(-1), 0.0, True, scale=ctx.scale,
            )  # fmt: skip
            for whole, block in zip(grads, blocks, strict=True):
                whole[0, :, part] = block.transpose(0, 1).flatten(1, 2)
        for q_start, q_end, k_start, k_end in ctx.plan.cross:
            part, seen = slice(q_start, q_end), slice(k_start, k_end)
            blocks = _backward(
                grad[:, :, part], query[:, :, part], key[:, :, seen], value[:, :, seen],
                out[:, :, part], log_sum[:, :, part], 0.0, False, scale=ctx.scale,
            )  # fmt: skip
            for whole, block, place in zip(grads, blocks, (part, seen, seen), strict=True):
                whole[:, :, place] += block
        return grads[0], grads[1], grads[2], None, None
