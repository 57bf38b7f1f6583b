from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from art_training_kit.packing import PackedRow, pack_rows
from art_training_kit.prefix_tree import sort_rows
from art_training_kit.rows import TokenRow
from art_training_kit.tree_attention import block_mask, plan_attention, tree_attention


def row_of(ids: list[int], trained: list[int], trajectory: int) -> TokenRow:
    old = np.array([-(trajectory + 1) - p / 1000 for p in trained], np.float32)
    return TokenRow(np.array(ids, np.int32), np.array(trained, np.int32), old, trajectory)


@st.composite
def steps(draw: st.DrawFn) -> list[TokenRow]:
    """Rows over few different ids, so that they share prefixes of every kind, duplicates and rows within rows too."""
    rows = []
    for trajectory in range(draw(st.integers(1, 14))):
        ids = draw(st.lists(st.integers(0, 2), min_size=2, max_size=24))
        if rows and draw(st.booleans()):
            start = rows[draw(st.integers(0, len(rows) - 1))].token_ids.tolist()
            ids = start[: draw(st.integers(1, len(start)))] + ids
        trained = draw(st.sets(st.integers(1, len(ids) - 1), min_size=1))
        rows.append(row_of(ids, sorted(trained), trajectory))
    return rows


def visible(row: PackedRow) -> Any:
    """The mask that the blocks add up to; each pair at most once."""
    seen = np.zeros((len(row), len(row)), dtype=int)
    for start, end in row.causal_blocks:
        seen[start:end, start:end] += np.tri(end - start, dtype=int)
    for q0, q1, k0, k1 in row.cross_blocks:
        seen[q0:q1, k0:k1] += 1
    return seen


@pytest.mark.slow
@settings(max_examples=80)
@given(steps(), st.integers(0, 60))
def test_every_sequence_can_be_read_back_exactly_once(rows: list[TokenRow], spare: int) -> None:
    capacity = max(int(row.trained[-1]) for row in rows) + spare
    packed = pack_rows(rows, capacity)
    assert sorted(i for row in packed for i in row.sequences.tolist()) == list(range(len(rows)))
    for row in packed:
        assert len(row) <= capacity
        seen = visible(row)
        position = np.arange(len(row))
        np.testing.assert_array_equal(
            seen, (position[None] <= position[:, None]) & (position[:, None] < row.tree_end[None])
        )
        assert len({(int(row.target_parent[t]), int(row.targets[t])) for t in range(len(row.targets))}) == len(
            row.targets
        )
        assert (np.diff(row.parents) > 0).all()
        for s, index in enumerate(row.sequences):
            original, mine = rows[index], row.entry_sequence == s
            targets = row.entry_target[mine]
            np.testing.assert_array_equal(row.targets[targets], original.token_ids[original.trained])
            np.testing.assert_array_equal(row.old_logprobs[mine], original.old_logprobs)
            assert (row.entry_trajectory[mine] == original.trajectory).all()
            for parent, depth in zip(row.parents[row.target_parent[targets]], original.trained, strict=True):
                path = np.flatnonzero(seen[parent])
                np.testing.assert_array_equal(row.token_ids[path], original.token_ids[:depth])
                np.testing.assert_array_equal(row.position_ids[path], np.arange(depth))


@settings(max_examples=60)
@given(steps())
def test_one_wide_row_holds_each_shared_prefix_once(rows: list[TokenRow]) -> None:
    prefixes = {tuple(row.token_ids[:n].tolist()) for row in rows for n in range(1, int(row.trained[-1]) + 1)}
    (packed,) = pack_rows(rows, 10_000)
    assert len(packed) == len(prefixes) == sort_rows([r.token_ids[: r.trained[-1]] for r in rows]).tree_tokens


def test_a_shared_sampled_token_is_one_prediction_with_several_entries() -> None:
    (packed,) = pack_rows([row_of([5, 6, 7], [1, 2], 0), row_of([5, 6, 8], [1, 2], 1)], 100)
    assert len(packed.targets) == 3
    assert len(packed.entry_target) == 4
    assert packed.token_ids.tolist() == [5, 6]


def test_full_rows_when_a_step_is_many_groups() -> None:
    rng, rows = np.random.default_rng(0), []
    for trajectory in range(400):
        prompt = np.random.default_rng(trajectory // 8).integers(0, 1000, 250)
        n = int(rng.integers(60, 160))
        rows.append(row_of([*prompt, *rng.integers(0, 1000, n)], list(range(250, 250 + n)), trajectory))
    packed = pack_rows(rows, 4096)
    assert sum(map(len, packed[:-1])) >= 0.97 * 4096 * (len(packed) - 1)
    assert sum(map(len, packed)) <= 1.1 * sort_rows([r.token_ids[: r.trained[-1]] for r in rows]).tree_tokens


def test_few_rows_are_of_much_the_same_length() -> None:
    rng = np.random.default_rng(0)
    rows = [row_of(rng.integers(0, 1000, 100).tolist(), [99], i) for i in range(26)]
    lengths = [len(row) for row in pack_rows(rows, 2048)]
    assert len(lengths) == 2
    assert min(lengths) > 0.7 * max(lengths)


def test_what_cannot_be_packed_is_refused() -> None:
    assert pack_rows([], 8) == []
    with pytest.raises(ValueError, match="needs 3 tokens"):
        pack_rows([row_of([1, 2, 3, 4], [3], 0)], 2)
    with pytest.raises(ValueError, match="no sampled token"):
        pack_rows([row_of([1, 2], [0], 0)], 8)


@settings(max_examples=25)
@given(steps(), st.sampled_from([(4, 4), (6, 2), (3, 1)]), st.integers(0, 2**31))
def test_block_attention_equals_masked_attention(rows: list[TokenRow], heads: tuple[int, int], seed: int) -> None:
    (row,) = pack_rows(rows, 10_000)
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, h, len(row), 8) for h in (heads[0], heads[1], heads[1])]
    exact = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    q, k, v = exact
    mask = torch.from_numpy(visible(row).astype(bool))
    repeat = heads[0] // heads[1]
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1), attn_mask=mask, scale=0.3
    )
    direction = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    slopes = torch.autograd.grad(expected, exact, direction)
    ours = [x.detach().float().requires_grad_() for x in exact]
    out = tree_attention(*ours, plan_attention(row, torch.device("cpu")), 0.3)
    np.testing.assert_allclose(out.detach(), expected.detach(), atol=5e-6)
    for got, want in zip(torch.autograd.grad(out, ours, direction.float()), slopes, strict=True):
        np.testing.assert_allclose(got, want, atol=3e-5)


@pytest.mark.slow
@settings(max_examples=8)
@given(st.integers(0, 10_000), st.integers(1, 7))
def test_the_mask_for_flex_attention_is_the_same_tree(seed: int, count: int) -> None:
    """On the CPU flex_attention runs uncompiled, with the very mask function that its CUDA kernels take."""
    rng, rows = np.random.default_rng(seed), []
    for trajectory in range(count):
        ids = rng.integers(0, 50, int(rng.integers(20, 160))).tolist()
        if rows:
            start = rows[int(rng.integers(0, len(rows)))].token_ids.tolist()
            ids = start[: int(rng.integers(1, len(start)))] + ids
        rows.append(row_of(ids, [len(ids) - 1], trajectory))
    (row,) = pack_rows(rows, 1_000_000)
    mask = block_mask(row, torch.device("cpu"))
    seen = visible(row).astype(bool)
    tiles = -(-len(row) // 128)
    padded = np.zeros((tiles * 128, tiles * 128), dtype=bool)
    padded[: len(row), : len(row)] = seen
    np.testing.assert_array_equal(mask.to_dense()[0, 0].numpy() > 0, padded.reshape(tiles, 128, tiles, 128).any((1, 3)))
    for q, k in zip(*np.nonzero(_full_tiles(mask, tiles)), strict=True):
        assert seen[q * 128 : (q + 1) * 128, k * 128 : (k + 1) * 128].all()
    q, k, v = (torch.randn(1, heads, len(row), 16) for heads in (4, 2, 2))
    blocks = tree_attention(q, k, v, plan_attention(row, torch.device("cpu")), 0.25)
    flexible = flex_attention(q, k, v, block_mask=mask, scale=0.25, enable_gqa=True)
    np.testing.assert_allclose(blocks, flexible, atol=2e-5)


def _full_tiles(mask: Any, tiles: int) -> Any:
    full = np.zeros((tiles, tiles), dtype=bool)
    for q in range(tiles):
        full[q, mask.full_kv_indices[0, 0, q, : mask.full_kv_num_blocks[0, 0, q]].numpy()] = True
    return full
