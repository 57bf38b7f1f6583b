"""The reference of hooks and protocols in docs/, made of their docstrings: `make reference`, or with --check, which
only says whether a page is what the code says.

Knows which protocols a plugin author meets, and how a docstring is written here. What they say is the code's alone.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

from art_core import hookspecs

DOCS: Final = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- Made of docstrings by `make reference`, from here: -->", "<!-- to here. -->"
WIDTH = 150

KINDS: Final = {
    "collected": "called when plugins load; what all plugins give is put together.",
    "first result": "called until a plugin gives something other than None. Runs off the event loop, so it may take its"
    " time.",
    "may refuse": "called before something is done. Raising refuses it, and the error reaches the caller. May be"
    " `async`.",
    "announced": "called after something was done. Raising is warned of, by the plugin's name, and keeps no other"
    " plugin from being called. May be `async`.",
}
PROTOCOLS: Final = {
    "Inference engines": (
        *("art_core:InferenceEngine", "art_core:InferenceLaunch", "art_core:LaunchPlan", "art_core:EngineCall"),
        *("art_core:InferenceEngineSpec", "art_core:InferenceCapability"),
    ),
    "Training engines": (
        *("art_core:TrainingEngine", "art_core:TrainingLaunch", "art_core:TrainingEngineSpec"),
        *("art_core:TrainingCapability", "art_training_kit.policy:Policy", "art_training_kit.policy:PolicyRequest"),
        "art_training_kit.policy:PolicyFactory",
    ),
    "Backends": (
        *("art_core:Backend", "art_core:PolicyModel", "art_core:Registration", "art_core:BackendSpec"),
        *("art_core:BackendCapability", "art_core:TrainResult", "art_core:LocalTrainResult"),
        "art_core:ServerlessTrainResult",
    ),
    "The verbs of a step and of a publication": (
        *("art_core:StepVerbs", "art_core:PublishVerbs", "art_core:SavedStep", "art_core:run_step"),
        *("art_core:publish_saved", "art_core.publication:Publisher", "art_core.publication:publish"),
        *("art_core.publication:PublicationLimits", "art_core:PublicationReceipt", "art_core:CheckpointRef"),
    ),
}


def kind_of(hook: str) -> str:
    """One of KINDS, as the loader and `announcements` treat it."""
    if hook.startswith("art_register_"):
        return "collected"
    if getattr(hookspecs, hook).art_spec["firstresult"]:
        return "first result"
    return "may refuse" if hook.startswith("art_before_") else "announced"


def hooks_reference() -> str:
    """Every hook under its kind, in the order of `art_core.hookspecs`."""
    names = [name for name in vars(hookspecs) if name.startswith("art_")]
    lines = []
    for kind, meaning in KINDS.items():
        lines += [f"## {kind.capitalize()}", "", *_wrapped(f"{meaning[0].upper()}{meaning[1:]}"), ""]
        for name in names:
            if kind_of(name) == kind:
                lines += [*_hook(name, getattr(hookspecs, name)), ""]
    return "\n".join(lines)


def protocols_reference() -> str:
    """Every protocol with its members, and what they take and give."""
    lines = []
    for title, names in PROTOCOLS.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += [*_described(name, pkgutil.resolve_name(name)), ""]
    return "\n".join(lines)


def _described(name: str, subject: Any) -> Iterator[str]:
    heading = name.replace(":", ".")
    if inspect.isfunction(subject):
        yield from _member(heading, subject, "###")
        return
    yield f"### `{heading}`"
    yield from _paragraphs(_text_of(name, subject))
    if issubclass(subject, Enum):
        yield from ("", "| capability | meaning |", "|---|---|")
        for member in subject:
            yield f"| `{member.name}` | {member.meaning} |"
    elif is_dataclass(subject):
        yield ""
        for field in fields(subject):
            default = "" if field.default is MISSING else f" = {field.default!r}"
            yield f"- `{field.name}: {field.type}{default}`"
    else:
        attributes = inspect.get_annotations(subject)
        yield from ("", *(f"- `{name}: {kind}`" for name, kind in attributes.items())) if attributes else ()
        for member, value in vars(subject).items():
            called = inspect.isfunction(value) and (member == "__call__" or not member.startswith("_"))
            if called or isinstance(value, property):
                yield ""
                yield from _member(member, value, "####")


def _member(name: str, member: Any, level: str) -> Iterator[str]:
    """A property or a function under its whole signature, and its docstring."""
    if isinstance(member, property):
        getter: Any = member.fget
        yield f"{level} `{name}: {inspect.signature(getter).return_annotation}`"
        yield from _paragraphs(_text_of(name, getter))
        return
    begun = "async " if inspect.iscoroutinefunction(member) else ""
    yield f"{level} `{begun}{name}{_signature(member)}`"
    yield from _paragraphs(_text_of(name, member))


def _signature(function: Any) -> str:
    """As it stands in the code, whose annotations are text, less `self`."""
    signature = inspect.signature(function)
    bare = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    written = []
    for each, shown in zip(signature.parameters.values(), bare, strict=True):
        name, equals, default = str(shown).partition("=")
        annotated = f"{name}: {each.annotation}" if each.annotation is not each.empty else name
        written.append(f"{annotated} = {default}" if equals else annotated)
    kinds = [each.kind for each in bare]
    if inspect.Parameter.VAR_POSITIONAL not in kinds and inspect.Parameter.KEYWORD_ONLY in kinds:
        written.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    if inspect.Parameter.POSITIONAL_ONLY in kinds:
        written.insert(max(n for n, kind in enumerate(kinds) if kind is inspect.Parameter.POSITIONAL_ONLY) + 1, "/")
    taken = ", ".join(each for each in written if each != "self")
    return f"({taken}) -> {signature.return_annotation}"


def _hook(name: str, hook: Any) -> Iterator[str]:
    """A hook, its docstring, what it gives, and each of its arguments."""
    signature = inspect.signature(hook)
    text, described = _parts(_text_of(name, hook))
    yield f"### `{name}({', '.join(signature.parameters)})`"
    yield from _paragraphs(text)
    if signature.return_annotation not in ("None", "Announced"):
        yield from ("", f"Gives `{signature.return_annotation}`.")
    if signature.parameters:
        yield ""
    for each in signature.parameters.values():
        yield from _wrapped(f"- `{each.name}: {each.annotation}`", described.pop(each.name, ""))
    if described:
        raise SystemExit(f"{name} describes {', '.join(described)}, which it does not take.")


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        yield ""
        yield from _wrapped(paragraph)


def _text_of(name: str, subject: Any) -> str:
    text = inspect.getdoc(subject) if inspect.isfunction(subject) else inspect.cleandoc(subject.__doc__ or "")
    if not text:
        raise SystemExit(f"{name} has no docstring, so there is nothing to say of it. Write one.")
    return text


def _parts(text: str) -> tuple[str, dict[str, str]]:
    """What a docstring says before its first `:param`, and what it says of each parameter."""
    before, *rest = re.split(r"^:param (\w+):", text, flags=re.MULTILINE)
    return before.strip(), dict(zip(rest[::2], (" ".join(said.split()) for said in rest[1::2]), strict=True))


def _wrapped(text: str, then: str = "") -> list[str]:
    joined = " ".join(f"{text}{': ' if then else ''}{then}".split())
    hanging = "  " if joined.startswith("- ") else ""
    return textwrap.wrap(joined, WIDTH, break_long_words=False, break_on_hyphens=False, subsequent_indent=hanging)


PAGES: Final = {"hooks.md": hooks_reference, "protocols.md": protocols_reference}


def main(check: bool) -> None:
    """Write the pages, or say which is not what the code says and leave with 1."""
    stale = []
    for name, made in PAGES.items():
        page = DOCS / name
        text = page.read_text(encoding="utf-8")
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise SystemExit(f"docs/{name} has lost its marks: put in a line {BEGIN!r} and below it {END!r}")
        now = f"{before}{BEGIN}\n\n{made().rstrip()}\n\n{END}{after}"
        if now != text and not check:
            page.write_text(now, encoding="utf-8")
        if now != text:
            stale.append(f"docs/{name}")
    if stale and check:
        raise SystemExit(f"{' and '.join(stale)} differ from the docstrings. Run: make reference")


if __name__ == "__main__":
    main("--check" in sys.argv[1:])
