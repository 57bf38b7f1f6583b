"""What a run found, for each suite and each thing that was held against it: a table and JSON.

Reads only the properties that travel with pytest's reports, so that it works in the controller of a distributed run.
Nothing that wasn't run counts as met.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from .catalogue import REVISION, requirements_of
from .requirements import Level, Requirement

_PARAMETER = re.compile(r"\[([^\[\]]+)\]$")


class Outcome(Enum):
    """What became of one check."""

    MET = "met"
    NOT_MET = "NOT MET"
    KNOWN_FAILURE = "known failure"  #: listed by the implementation with its reason, and it did fail
    UNEXPECTED_PASS = "unexpected pass"  #: listed as a known failure, and it passed
    MACHINE = "fault of the machine"  #: what the machine or the run did, which says nothing of the subject
    UNTESTABLE = "untestable"  #: something that the check needs isn't here
    UNDECLARED = "undeclared"  #: the capability that it needs isn't declared
    NOT_RUN = "not run"


# Of several outcomes of one check the first in this order stands.
_WORST = (Outcome.NOT_MET, Outcome.UNEXPECTED_PASS, Outcome.KNOWN_FAILURE, Outcome.MACHINE, Outcome.UNTESTABLE)
_LISTED = (Outcome.KNOWN_FAILURE, Outcome.UNEXPECTED_PASS)


@dataclass
class Verdict:
    """The outcomes of one suite for one subject."""

    suite: str
    subject: str
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)

    def note(self, id: str, outcome: Outcome, detail: str) -> None:
        """Keep an outcome; of a check's phases and repetitions the worst one counts."""
        if _rank(self.outcomes.get(id, Outcome.NOT_RUN)) < _rank(outcome):
            return
        self.outcomes[id] = outcome
        if detail:
            self.details[id] = detail

    def rows(self) -> list[tuple[Requirement, Outcome]]:
        """Every requirement of the suite with its outcome."""
        return [(r, self.outcomes.get(r.id, Outcome.NOT_RUN)) for r in requirements_of(self.suite)]

    def count(self, outcome: Outcome, level: Level | None = None) -> int:
        """How many requirements (of a level) have an outcome."""
        return sum(1 for r, found in self.rows() if found is outcome and level in (None, r.level))

    @property
    def conformant(self) -> bool:
        """True when every MUST that applies was run and is met, and nothing is listed as a known failure."""
        return self.word == "conformant"

    @property
    def word(self) -> str:
        """The verdict in a word or two: that it isn't conformant, or what keeps it from being said, comes first."""
        if self.count(Outcome.NOT_MET, Level.MUST) or any(self.count(outcome) for outcome in _LISTED):
            return "NOT conformant"
        for outcome in (Outcome.MACHINE, Outcome.UNTESTABLE):
            if self.count(outcome, Level.MUST):
                return str(outcome.value)
        return "incomplete" if self.count(Outcome.NOT_RUN, Level.MUST) or not self.count(Outcome.MET) else "conformant"

    @property
    def target(self) -> str:
        """What was checked, as short as it can be told: what stands in brackets, else the class of the checks."""
        parameter = _PARAMETER.search(self.subject)
        return parameter[1] if parameter else self.subject.rpartition("::")[2]

    def summary(self) -> str:
        """One line."""
        counts = ", ".join(f"{self.count(o)} {o.value}" for o in Outcome if self.count(o))
        return f"{self.suite} rev {REVISION}, {self.target}: {self.word} ({counts})"

    def as_json(self) -> dict[str, Any]:
        """The object in the report file."""
        return {
            "suite": self.suite,
            "subject": self.subject,
            "revision": REVISION,
            "conformant": self.conformant,
            "verdict": self.word,
            "counts": {outcome.value: self.count(outcome) for outcome in Outcome},
            "checks": [
                {**r.as_json(), "outcome": outcome.value, "detail": self.details.get(r.id, "")}
                for r, outcome in self.rows()
            ],
        }


def _rank(outcome: Outcome) -> int:
    return _WORST.index(outcome) if outcome in _WORST else len(_WORST)


class ConformanceReport:
    """Collects outcomes while pytest runs."""

    def __init__(self) -> None:
        self.verdicts: dict[tuple[str, str], Verdict] = {}

    def note(self, properties: Mapping[str, str], outcome: Outcome, detail: str) -> None:
        """Keep the outcome of one check, named by the properties of its test."""
        key = (properties["suite"], properties["subject"])
        self.verdicts.setdefault(key, Verdict(*key)).note(properties["id"], outcome, detail)

    def lines(self, *, verbose: bool = False) -> list[str]:
        """A line for each suite and subject, and one for each requirement that was looked at and is not met. With
        `verbose` every requirement has its line.
        """
        lines: list[str] = []
        for verdict in self.verdicts.values():
            lines.append(verdict.summary())
            if verbose:
                lines.append(f"  {verdict.subject}")
            for requirement, outcome in verdict.rows():
                if outcome in (Outcome.MET, Outcome.NOT_RUN) and not verbose:
                    continue
                lines.append(
                    f"  {requirement.id}  {requirement.level.value:<6}  {outcome.value:<15}  {requirement.text}"
                )
                if requirement.id in verdict.details:
                    lines.append(f"           {verdict.details[requirement.id]}")
        return lines

    def write(self, path: Path) -> None:
        """Write the JSON report."""
        content = [verdict.as_json() for verdict in self.verdicts.values()]
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
