"""Which rows go together, against the least that counting and trying everything allow."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from art_training_kit.prefix_tree import Order, sort_rows
from art_training_kit.row_assignment import assign_evenly, assign_rows

Rows = list[list[int]]


@st.composite
def token_rows(draw: st.DrawFn, most: int = 40, longest: int = 30) -> Rows:
    """Rows over few ids, many of which go on from a part of another: duplicates, rows within rows, deep branchings."""
    rows: Rows = []
    for _ in range(draw(st.integers(1, most))):
        ids = draw(st.lists(st.integers(0, 3), min_size=1, max_size=longest // 2))
        if draw(st.booleans()) and rows:
            start = rows[draw(st.integers(0, len(rows) - 1))]
            ids = (start[: draw(st.integers(1, len(start)))] + ids)[:longest]
        rows.append(ids)
    return rows


def order_of(rows: Rows) -> Order:
    return sort_rows([np.array(row, np.int32) for row in rows])


def prefixes(rows: Rows) -> int:
    """Tokens of a packed row, counted without the code under test."""
    return len({tuple(row[:n]) for row in rows for n in range(1, len(row) + 1)})


def packed(rows: Rows, order: Order, assigned: list[Any]) -> list[Rows]:
    return [[rows[order.permutation[position]] for position in members] for members in assigned]


@pytest.mark.slow
@settings(max_examples=150)
@given(token_rows(), st.integers(0, 60))
def test_every_row_is_in_one_packed_row_and_none_is_too_long(rows: Rows, spare: int) -> None:
    order, capacity = order_of(rows), max(map(len, rows)) + spare
    for assign in (assign_rows, assign_evenly):
        assigned = assign(order, capacity)
        assert sorted(np.concatenate(assigned).tolist()) == list(range(len(rows)))
        assert all((np.diff(members) > 0).all() for members in assigned)
        lengths = [prefixes(row) for row in packed(rows, order, assigned)]
        assert max(lengths) <= capacity
        assert order.least_tokens(capacity) <= sum(lengths)
        again = assign(order_of(rows), capacity)
        assert [members.tolist() for members in again] == [members.tolist() for members in assigned]


@settings(max_examples=100)
@given(token_rows(), st.integers(0, 60))
def test_never_more_than_twice_the_rows_that_counting_allows(rows: Rows, spare: int) -> None:
    order, capacity = order_of(rows), max(map(len, rows)) + spare
    assert len(assign_rows(order, capacity)) <= 2 * -(-order.least_tokens(capacity) // capacity)


@settings(max_examples=60)
@given(token_rows(most=6, longest=16), st.integers(0, 12))
def test_of_few_rows_at_most_one_packed_row_more_than_the_best_of_all_ways(rows: Rows, spare: int) -> None:
    order, capacity = order_of(rows), max(map(len, rows)) + spare
    ways = [way for way in partitions(rows) if max(map(prefixes, way)) <= capacity]
    assert order.least_tokens(capacity) <= min(sum(map(prefixes, way)) for way in ways)
    assert len(assign_rows(order, capacity)) <= min(map(len, ways)) + 1


def partitions(rows: Rows) -> Iterator[list[Rows]]:
    if not rows:
        yield []
        return
    for way in partitions(rows[1:]):
        yield [[rows[0]], *way]
        for index, row in enumerate(way):
            yield [*way[:index], [rows[0], *row], *way[index + 1 :]]


@settings(max_examples=40)
@given(
    st.integers(0, 2**31),
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(0, 60),
    st.integers(1, 300),
    st.integers(1, 300),
)
def test_groups_of_short_rows_need_at_most_one_row_more_than_counting_allows(
    seed: int, groups: int, size: int, system: int, prompt: int, answer: int
) -> None:
    rng, capacity = np.random.default_rng(seed), 4096
    rows: Rows = []
    for _ in range(groups):
        start = [1] * system + rng.integers(2, 1000, prompt).tolist()
        rows += [start + rng.integers(2, 1000, int(rng.integers(1, answer + 1))).tolist() for _ in range(size)]
    order = order_of(rows)
    assigned = assign_rows(order, capacity)
    assert len(assigned) <= -(-order.least_tokens(capacity) // capacity) + 1


def test_a_group_is_split_only_where_a_row_would_be_missing() -> None:
    rng = np.random.default_rng(0)
    rows: Rows = []
    for _ in range(6):
        prompt = rng.integers(0, 1000, 100).tolist()
        rows += [prompt + rng.integers(0, 1000, 50).tolist() for _ in range(4)]  # 300 tokens a group
    order = order_of(rows)
    assert [len(members) for members in assign_rows(order, 600)] == [8, 8, 8]
    assert sum(map(prefixes, packed(rows, order, assign_rows(order, 600)))) == order.tree_tokens
    assert len(assign_rows(order, 950)) == 2
    assert len(assign_rows(order, 700)) == 3


@pytest.mark.slow
def test_a_long_prompt_is_repeated_in_as_few_rows_as_its_answers_need() -> None:
    rng = np.random.default_rng(0)
    rows: Rows = []
    for _ in range(3):
        prompt = rng.integers(0, 1000, 1500).tolist()
        rows += [prompt + rng.integers(0, 1000, int(rng.integers(20, 60))).tolist() for _ in range(40)]
    order = order_of(rows)
    assigned = assign_rows(order, 2048)
    tokens = sum(map(prefixes, packed(rows, order, assigned)))
    assert len(assigned) == -(-order.least_tokens(2048) // 2048)
    assert tokens == order.least_tokens(2048)


def test_conversations_that_all_go_on_from_one_another() -> None:
    """A branching for every row, each inside the one before."""
    base = np.random.default_rng(0).integers(0, 1000, 3000).tolist()
    rows = [base[: 2 * n] + [1000 + n] * 10 for n in range(1, 1500)]
    order = order_of(rows)
    assigned = assign_rows(order, 4000)
    assert sorted(np.concatenate(assigned).tolist()) == list(range(len(rows)))
    assert all((order.lengths[m] - order.shared_with_previous(m)).sum() <= 4000 for m in assigned)
    assert len(assigned) <= 1.3 * order.least_tokens(4000) / 4000 + 1


@pytest.mark.parametrize("count", [2, 3, 8])
def test_few_packed_rows_are_of_much_the_same_length(count: int) -> None:
    rng, capacity = np.random.default_rng(count), 4096
    rows: Rows = []
    while order_of([*rows, [0]]).tree_tokens < (count - 0.6) * capacity:
        prompt = rng.integers(0, 1000, 100).tolist()
        rows += [prompt + rng.integers(0, 1000, int(rng.integers(50, 200))).tolist() for _ in range(4)]
    order = order_of(rows)
    lengths = [prefixes(row) for row in packed(rows, order, assign_evenly(order, capacity))]
    assert len(lengths) == count
    assert min(lengths) > 0.7 * max(lengths)


@pytest.mark.slow
@example(rows=[[0], [0, 1], [0, 1, 2]])
@example(rows=[[5, 5], [5, 5], [5, 5]])
@settings(max_examples=60)
@given(token_rows())
def test_what_a_selection_shares_is_what_its_rows_share(rows: Rows) -> None:
    order = order_of(rows)
    everything = np.arange(len(rows))
    for members in (everything, everything[::2], everything[1::3], everything[-1:]):
        if not len(members):
            continue
        chosen = packed(rows, order, [members])[0]
        expected = [0, *(common(a, b) for a, b in pairwise(chosen))]
        assert order.shared_with_previous(members).tolist() == expected


def common(a: list[int], b: list[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
