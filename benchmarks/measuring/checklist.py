"""A list of things to try in order, each with an outcome and a sentence, and the table of them.

Knows nothing of what is tried. What fails never keeps the next thing from being tried.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from rich.console import Console
from rich.markup import escape
from rich.table import Table

ITEM_LIMIT_S = 1800.0
STYLES = {"ok": "green", "failed": "bold red", "not possible here": "yellow"}


class Outcome(Enum):
    """What became of an item."""

    OK = "ok"
    FAILED = "failed"
    NOT_POSSIBLE = "not possible here"


class NotPossible(Exception):
    """Raised by an item that this machine, or what is installed on it, cannot do; the text says why."""


@dataclass(frozen=True)
class Item:
    """One row: what it is about, what is tried, and the coroutine function that tries it and gives what it saw.

    It raises NotPossible, or anything else when it failed.
    """

    about: str
    what: str
    check: Callable[[], Awaitable[str]]


@dataclass(frozen=True)
class Row:
    """An item's outcome, what was seen or why it failed, and its seconds."""

    item: Item
    outcome: Outcome
    said: str
    seconds: float


async def try_item(item: Item, limit_s: float = ITEM_LIMIT_S) -> Row:
    """Try one item, for at most `limit_s`."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(limit_s):
            outcome, said = Outcome.OK, await item.check()
    except NotPossible as reason:
        outcome, said = Outcome.NOT_POSSIBLE, str(reason)
    except Exception as error:
        outcome, said = Outcome.FAILED, f"{type(error).__name__}: {error}".removesuffix(": ")
    return Row(item, outcome, said, time.monotonic() - began)


async def try_all(items: Iterable[Item], console: Console) -> list[Row]:
    """Try every item in turn; each outcome is printed as it comes, a failure with all its reason."""
    rows = []
    for item in items:
        with console.status(escape(f"{item.about}: {item.what}")):
            row = await try_item(item)
        rows.append(row)
        style = STYLES[row.outcome.value]
        console.print(
            f"[{style}]{row.outcome.value}[/] {escape(item.about)}: {escape(item.what)} ({row.seconds:.0f} s)"
            f"  {escape(row.said)}",
            highlight=False,
        )
    return rows


def table_of(rows: Sequence[Row]) -> Table:
    """A row an item; a long reason is cut to its first lines."""
    table = Table("about", "what", "outcome", "seen, or why not", "seconds")
    for row in rows:
        said = "\n".join(line[:200] for line in row.said.splitlines()[:4])
        style = STYLES[row.outcome.value]
        table.add_row(
            escape(row.item.about),
            escape(row.item.what),
            f"[{style}]{row.outcome.value}[/]",
            escape(said),
            f"{row.seconds:.0f}",
        )
    return table


def exit_code(rows: Sequence[Row]) -> int:
    """1 when something failed, or when nothing at all was ok; else 0."""
    outcomes = [row.outcome for row in rows]
    return 1 if Outcome.FAILED in outcomes or Outcome.OK not in outcomes else 0
