"""The page that lists every requirement of the conformance suite: `make reference`, or with --check, which only says
whether the page is what the suites say.

Knows how the page looks, and what each suite is for. The requirements are the suites' alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from art_conformance import catalogue
from art_conformance.requirements import Requirement

PAGE: Final = Path(__file__).parents[2] / "docs" / "requirements.md"
INTRODUCTION: Final = """\
# The requirements

What `art-conformance` asks of every plugin, in revision {revision}: {count} requirements, each of which is a check by
itself. A MUST that isn't met fails the run; a SHOULD is reported. Where a capability is named, the requirement applies
to who declares it. A live one starts real processes, and is left out by `-m "not slow"`. An id never gets another
meaning, and isn't used again when it goes.

Made by `make reference` of the suites themselves; `art-conformance list` prints the same.
[writing-a-plugin.md](writing-a-plugin.md) says how a plugin is held to them, [traceability.md](traceability.md) which
promise of these pages each belongs to.
"""
KINDS: Final = {
    "PluginConformance": "Every installed plugin.",
    "InferenceEngineConformance": "Inference engines, and the servers that they start.",
    "TrainingEngineConformance": "Training engines, and their workers.",
    "PublicationConformance": "Publication: a backend together with an inference engine.",
    "BackendConformance": "Backends.",
    "TrackerConformance": "Trackers.",
}


def page_of(suites: Mapping[str, Sequence[Requirement]], revision: int) -> str:
    """The whole page. Raises KeyError for a suite that KINDS doesn't know."""
    lines = [INTRODUCTION.format(revision=revision, count=sum(map(len, suites.values())))]
    for suite, requirements in suites.items():
        lines += [f"## `{suite}`", "", KINDS[suite], ""]
        lines += ["| id | level | requirement | when declared | live |", "|---|---|---|---|---|"]
        lines += [*map(row, requirements), ""]
    return "\n".join(lines)


def row(requirement: Requirement) -> str:
    """A requirement as a row of the table."""
    text = requirement.text.replace("|", "\\|")
    needs = "" if requirement.needs is None else f"`{requirement.needs.value}`"
    cells = (requirement.id, requirement.level.value, text, needs, "yes" if requirement.live else "")
    return f"| {' | '.join(cells)} |"


def main(check: bool) -> None:
    """Write the page, or leave with 1 where it isn't what the suites say."""
    made = page_of(catalogue.requirements(), catalogue.REVISION)
    now = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if made != now and check:
        raise SystemExit("docs/requirements.md is not what the suites say. Run: make reference")
    if made != now:
        PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main("--check" in sys.argv[1:])
