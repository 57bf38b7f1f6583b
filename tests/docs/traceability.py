"""The page that says what holds each promise: `make reference`, or with --check, which only says what is wrong with it.

Knows which sections of the docs promise something, and how promises stand there; what holds each is written by hand in
promises.toml. Knows nothing of what is promised.
"""

from __future__ import annotations

import ast
import os
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from art_conformance import catalogue

ROOT: Final = Path(__file__).parents[2]
DOCS: Final = ROOT / "docs"
PAGE: Final = DOCS / "traceability.md"
MAPPING: Final = Path(__file__).with_name("promises.toml")
# Each of these sections promises, in rows of tables, in the items of lists, and in sentences.
SECTIONS: Final = {
    "architecture.md": ("What stays true",),
    "faults.md": ("What you gave", "Processes and disk", "A machine elsewhere", "The machine"),
    "pipeline.md": ("What it promises",),
    "publication.md": (
        *("What verified means", "What is done before a checkpoint is whole", "What is served when", "When it fails"),
    ),
    "checkpoints.md": ("Whole or not there", "Names", "save_checkpoint"),
    "adapters.md": ("Starting from an adapter", "What a server is handed"),
    "training.md": ("What is computed", "Several GPUs"),
    "sft.md": ("Which tokens are replies", "From a file"),
    "trackers.md": ("When a tracker is slow or fails",),
    "serverless.md": ("When something fails",),
    "compatibility.md": ("The plugin interface", "What is deprecated"),
    "self-hosting.md": ("Keys and entities", "What is kept, and what happens to a job", "Upgrades and backups"),
    "requests.md": ("What no request does",),
}
INTRODUCTION: Final = """\
# What holds each promise

Each promise of these pages, the requirements of the conformance suite that every plugin of its kind is held to
([requirements.md](requirements.md)), and the tests of this repository that hold ours to it. Made by `make reference` of
`tests/docs/promises.toml`, which is written by hand; a test fails when a page promises something that isn't in it, or
when a requirement or a test that it names isn't there. At the end is what is held by less.
"""
# Not within backquotes: an even number of them follows.
_SENTENCE_END: Final = re.compile(r"(?<=[.!?:]) (?=[A-Z`])(?=(?:[^`]*`[^`]*`)*[^`]*$)")


@dataclass(frozen=True)
class Statement:
    """What a page says in one of its SECTIONS: a row by its first cell, an item by its bold beginning, a sentence."""

    page: str
    section: str
    words: str


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What holds a statement. `tests` are "path::name"; `open` says what of it nothing holds."""

    page: str
    words: str
    ids: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    open: str = ""


@dataclass(frozen=True)
class Mapping:
    """The promises, and by page the beginnings of those statements that promise nothing."""

    promises: tuple[Promise, ...]
    asides: dict[str, tuple[str, ...]]


def read_mapping(text: str) -> Mapping:
    """Raises TypeError for a field that a promise doesn't have."""
    read: dict[str, Any] = tomllib.loads(text)
    promises = [
        Promise(**{name: tuple(value) if isinstance(value, list) else value for name, value in each.items()})
        for each in read["promise"]
    ]
    return Mapping(tuple(promises), {page: tuple(words) for page, words in read.get("asides", {}).items()})


def statements() -> list[Statement]:
    """Every statement of every section, in the order of the pages."""
    return [
        Statement(page, title, words)
        for page, titles in SECTIONS.items()
        for title in titles
        for words in stated(section_of((DOCS / page).read_text(encoding="utf-8"), title, page))
    ]


def section_of(text: str, title: str, page: str) -> str:
    """What stands below a heading of the second level, without blocks of code."""
    below = [part for part in re.split(r"^## ", text, flags=re.MULTILINE) if part.startswith(f"{title}\n")]
    if len(below) != 1:
        raise SystemExit(f"docs/{page} has {len(below)} sections {title!r}: name the right ones in SECTIONS.")
    return re.sub(r"^```.*?^```$", "", below[0].removeprefix(title), flags=re.MULTILINE | re.DOTALL)


def stated(section: str) -> Iterator[str]:
    """The statements of a section."""
    for paragraph in re.split(r"\n\s*\n", section.strip()):
        if paragraph.startswith("|"):
            yield from (row.strip("|").split(" | ")[0].strip() for row in paragraph.splitlines()[2:])
        elif re.match(r"- |\d+\. ", paragraph):
            for item in re.split(r"^(?:- |\d+\. )", paragraph, flags=re.MULTILINE)[1:]:
                words = " ".join(item.split())
                bold = re.match(r"\*\*(.+?)\.?\*\*", words)
                yield bold[1] if bold else words
        else:
            yield from _SENTENCE_END.split(" ".join(paragraph.split()))


def faults(said: Iterable[Statement], mapping: Mapping) -> Iterator[str]:
    """What is wrong with the mapping, a sentence each: what isn't mapped once, and what it names that isn't there."""
    said = [each for each in said if not _is_aside(each, mapping)]
    times = Counter((each.page, each.words) for each in mapping.promises)
    there = {(each.page, each.words) for each in said}
    for page, words in there:
        if times[page, words] != 1:
            yield f"docs/{page} says {words!r}, which the mapping has {times[page, words]} times."
    for page, words in times.keys() - there:
        yield f"The mapping has {words!r} of docs/{page}, which doesn't say so (any more)."
    known = requirements()
    for promise in mapping.promises:
        for id in promise.ids:
            if id not in known:
                yield f"{id}, named for {promise.words!r}, is no requirement of revision {catalogue.REVISION}."
        for test in promise.tests:
            if not is_there(test):
                yield f"{test}, named for {promise.words!r}, is no test here."
        if promise.open and not promise.ids and not promise.tests:
            yield f"{promise.words!r} is held by nothing, so all of it is open: leave out what it says of that."


def _is_aside(each: Statement, mapping: Mapping) -> bool:
    return each.words.startswith(mapping.asides.get(each.page, ()))


def requirements() -> dict[str, dict[str, Any]]:
    """Each requirement of the revision in force, by id."""
    return {each["id"]: each for suite in catalogue.frozen()["suites"].values() for each in suite}


def is_there(test: str) -> bool:
    """True when the file has a test of that name, at its top or in the class that is named before it."""
    path, _, names = test.partition("::")
    return names in _names_in(ROOT / path)


@cache
def _names_in(file: Path) -> frozenset[str]:
    if not file.is_file() or not file.name.startswith("test_"):
        return frozenset()
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) if name.startswith("test_"):
                found.add(name)
            case ast.ClassDef(name=name, body=body) if name.startswith("Test"):
                functions = [each for each in body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
                found |= {name, *(f"{name}::{each.name}" for each in functions if each.name.startswith("test_"))}
            # A state machine of hypothesis becomes a test by its name.
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Attribute(attr="TestCase")):
                found.add(name)
    return frozenset(found)


def page_of(said: Iterable[Statement], mapping: Mapping) -> str:
    """The whole page."""
    by_words = {(each.page, each.words): each for each in mapping.promises}
    promised = [(each, by_words[each.page, each.words]) for each in said if not _is_aside(each, mapping)]
    promises = [promise for _, promise in promised]
    lines = [INTRODUCTION, *_counts(promises), ""]
    for (page, title), group in groupby(promised, lambda each: (each[0].page, each[0].section)):
        lines += [f"## [{page}]({page}): {title}", "", "| promise | requirements | tests |", "|---|---|---|"]
        for _, promise in group:
            lines.append(f"| {_cell(promise.words)} | {', '.join(promise.ids)} | {_tests(promise.tests)} |")
        lines.append("")
    own = [each for each in promises if each.tests and not each.ids]
    nothing = [each for each in promises if not each.tests and not each.ids]
    lines += ["## Held by our own tests only", "", "No requirement asks a plugin of somebody else's for these.", ""]
    lines += [*_listed(own), "", "## Held by nothing", "", *(_listed(nothing) or ["There is none."]), ""]
    lines += ["## Held in part", "", "What of a promise no requirement and no test looks at.", ""]
    lines += [f"- [{each.page}]({each.page}), {each.words}: {each.open}" for each in promises if each.open] or ["None."]
    named = {id for each in promises for id in each.ids}
    lines += ["", "## Requirements that no promise names", "", "They are promised by the protocols ([protocols.md]"]
    lines[-1] += "(protocols.md)) and by how engines are spoken to."
    lines += ["", "| id | level | requirement |", "|---|---|---|"]
    lines += [
        f"| {id} | {each['level']} | {_cell(each['requirement'])} |"
        for id, each in requirements().items()
        if id not in named
    ]
    return "\n".join([*lines, ""])


def _counts(promises: list[Promise]) -> Iterator[str]:
    with_ids = sum(bool(each.ids) for each in promises)
    own = sum(bool(each.tests) and not each.ids for each in promises)
    nothing = len(promises) - with_ids - own
    named = {id for each in promises for id in each.ids}
    yield (
        f"{len(promises)} promises: {with_ids} are held by requirements, {own} by our own tests only, {nothing} by"
        f" nothing. {len(named)} of the {len(requirements())} requirements of revision {catalogue.REVISION} are named."
    )


def _listed(promises: list[Promise]) -> list[str]:
    return [f"- [{each.page}]({each.page}): {each.words}" for each in promises]


def _tests(tests: tuple[str, ...]) -> str:
    """Under each file the names of its tests."""
    cells = []
    for path, named in groupby(tests, lambda each: each.partition("::")[0]):
        names = ", ".join(f"`{each.partition('::')[2]}`" for each in named)
        cells.append(f"[{Path(path).stem}]({os.path.relpath(ROOT / path, DOCS)}): {names}")
    return "; ".join(cells)


def _cell(words: str) -> str:
    return words.replace("|", "\\|")


def main(check: bool) -> None:
    """Write the page, or say what is wrong with it or with the mapping and leave with 1."""
    said, mapping = statements(), read_mapping(MAPPING.read_text(encoding="utf-8"))
    if found := sorted(faults(said, mapping)):
        raise SystemExit("\n".join([*found, "Mend tests/docs/promises.toml."]))
    made = page_of(said, mapping)
    now = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if made != now and check:
        raise SystemExit("docs/traceability.md differs from tests/docs/promises.toml. Run: make reference")
    if made != now:
        PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main("--check" in sys.argv[1:])
