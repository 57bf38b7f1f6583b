"""What benchmarks conclude from what they saw: labels of answers, stages of a publication, outcomes of a checklist."""

from __future__ import annotations

import asyncio
import io
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from measuring.checklist import Item, NotPossible, Outcome, exit_code, table_of, try_all, try_item
from measuring.http_load import Upstream, ask_for, ask_times, request_bytes
from measuring.quantiles import quantile
from measuring.rollout_traffic import wrong_label
from measuring.training_rows import TURNS, sequences_of, sharing_bound, sharing_nothing, total_tokens
from publish_latency import STAGES, Watch, optimizer_ends, stages_of, summary
from rich.console import Console

from art_core import ModelKey, PublicationReceipt

VOCABULARY = range(3, 49000)


def answer(version: Any = 3, model: str = "agent@3") -> dict[str, Any]:
    return {"model": model, "choices": [{"policy_version": version}, {"policy_version": version}]}


@pytest.mark.parametrize(
    ("asked", "content", "header"),
    [("agent", answer(), "3"), ("agent@3", answer(), "3"), ("agent", answer(4, "agent@4"), "4")],
)
def test_an_answer_under_its_own_name_is_right(asked: str, content: dict[str, Any], header: str) -> None:
    assert wrong_label("agent", asked, content, header, not_before=3, not_after=4) == ""


@pytest.mark.parametrize(
    ("asked", "content", "header"),
    [
        ("agent@2", answer(), "3"),
        ("agent", answer(2, "agent@2"), "2"),
        ("agent", answer(5, "agent@5"), "5"),
        ("agent", answer(), "2"),
        ("agent", answer(), None),
        ("agent", answer(3, "agent@4"), "3"),
        ("agent", answer(None), "3"),
        ("agent", {"model": "agent@3", "choices": [{"policy_version": 3}, {"policy_version": 4}]}, "3"),
    ],
)
def test_an_answer_under_another_name_is_found(asked: str, content: dict[str, Any], header: str | None) -> None:
    assert wrong_label("agent", asked, content, header, not_before=3, not_after=4)


def test_the_optimizer_ended_at_its_last_gradient_step(tmp_path: Path) -> None:
    lines = [
        "2026-03-01 12:00:00,500 art_training_kit.trainer INFO step 7, gradient step 1 of 2: {'loss/train': 0.1}",
        "2026-03-01 12:00:01,250 art_training_kit.trainer INFO step 7, gradient step 2 of 2: {'loss/train': 0.1}",
        "2026-03-01 12:00:02,000 art_training_kit.trainer INFO loaded something",
    ]
    (tmp_path / "training-torch-base.log").write_text("\n".join(lines))
    assert optimizer_ends(tmp_path) == {7: datetime(2026, 3, 1, 12, 0, 1, 250_000).timestamp()}


def test_stages_add_up_to_the_time_from_the_optimizer_to_the_first_token() -> None:
    spent = {"checked": 0.010, "loaded": 0.040, "verified": 0.030, "routed": 0.0}
    receipt = PublicationReceipt(model=ModelKey("p", "m"), step=1, inference_name="m@1", seconds=spent)
    watch = Watch(
        written_at={1: 10.05}, saved_at={1: 10.1}, published_at={1: 10.2}, answered={1: 10.25}, receipts={1: receipt}
    )
    [row] = stages_of(watch, {1: 10.0}, [1])
    assert tuple(row) == STAGES
    assert sum(row.values()) == pytest.approx(0.25)
    found = summary([row], [0.02])
    assert found["total"]["p50"] == pytest.approx(250)
    assert found["usual first token"]["p50"] == pytest.approx(20)
    assert found["beyond load"]["p99"] == pytest.approx(210)
    with pytest.raises(RuntimeError, match="step 2 has no end of its optimizer"):
        stages_of(watch, {1: 10.0}, [2])


def test_quantiles_are_values_that_were_seen() -> None:
    assert quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.0
    assert quantile([float(i) for i in range(1, 31)], 0.99) == 30.0
    assert quantile([5.0], 0.5) == 5.0


@pytest.mark.parametrize(("count", "at_once"), [(10, 3), (4, 4)])
async def test_as_many_requests_are_made_as_were_asked_for(count: int, at_once: int) -> None:
    body = b"{}"
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    server = await asyncio.get_running_loop().create_server(lambda: Upstream(whole, 0.0), "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        request = request_bytes(port, "/", "key", b"{}")
        assert len(await ask_times(count, port, request, at_once)) == count
        assert len(await ask_for(0.0, port, request, at_once)) == at_once


async def test_an_answer_that_is_none_is_an_error() -> None:
    whole = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
    server = await asyncio.get_running_loop().create_server(lambda: Upstream(whole, 0.0), "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(RuntimeError, match="503"):
            await ask_times(1, port, request_bytes(port, "/", "key", b"{}"), 1)


async def fine() -> str:
    return "as it should be"


async def broken() -> str:
    raise ValueError("the weights are [wrong]")


async def elsewhere() -> str:
    raise NotPossible("there is one GPU")


async def endless() -> str:
    await asyncio.sleep(3600)
    return "never"


async def test_every_item_has_its_row_whatever_becomes_of_the_one_before() -> None:
    items = [Item("engine", "breaks", broken), Item("engine", "works", fine), Item("engine", "is left", elsewhere)]
    printed = io.StringIO()
    rows = await try_all(items, Console(file=printed, width=200))
    assert [row.outcome for row in rows] == [Outcome.FAILED, Outcome.OK, Outcome.NOT_POSSIBLE]
    shown = io.StringIO()
    Console(file=shown, width=200).print(table_of(rows))
    for text in (printed.getvalue(), shown.getvalue()):
        for part in ("failed", "ValueError: the weights are [wrong]", "as it should be", "there is one GPU"):
            assert part in text
    assert exit_code(rows) == 1
    assert exit_code(rows[1:]) == 0
    assert exit_code(rows[2:]) == 1, "nothing was seen to work"


async def test_an_item_that_never_ends_has_failed() -> None:
    row = await try_item(Item("engine", "hangs", endless), limit_s=0.01)
    assert (row.outcome, row.said) == (Outcome.FAILED, "TimeoutError")


def test_one_prompt_is_shared_as_far_as_the_formula_says() -> None:
    sequences = sequences_of("256,32,8", VOCABULARY)
    assert [(len(each.token_ids), each.begin) for each in sequences] == [(288, 256)] * 8
    assert total_tokens(sequences) == 8 * 288
    assert sharing_bound(sequences) == pytest.approx(8 * (256 + 32) / (256 + 8 * 32), rel=0.01)


def test_turns_share_a_prompt_and_what_stays_of_earlier_turns() -> None:
    sequences = sequences_of(TURNS, VOCABULARY)
    assert len(sequences) == 8 * 4
    assert [len(each.token_ids) for each in sequences[:4]] == [320, 360, 400, 440]
    assert sharing_bound(sequences) == pytest.approx(total_tokens(sequences) / (256 + 8 * (4 * 64 + 3 * 40)), rel=0.01)


def test_what_shares_nothing_is_as_long_and_is_trained_alike() -> None:
    sequences = sequences_of(TURNS, VOCABULARY)
    apart = sharing_nothing(sequences, VOCABULARY)
    assert [(len(each.token_ids), each.begin) for each in apart] == [
        (len(each.token_ids), each.begin) for each in sequences
    ]
    assert sharing_bound(apart) < 1.05


@pytest.mark.parametrize("shape", ["256,32", "256,32,0", "a,b,c", ""])
def test_a_shape_that_is_none_is_refused_in_words(shape: str) -> None:
    with pytest.raises(ValueError, match=r"P,R,G"):
        sequences_of(shape, VOCABULARY)
