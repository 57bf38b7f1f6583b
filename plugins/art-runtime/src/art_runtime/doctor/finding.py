"""What one check found. Knows no check."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How a finding is to be taken."""

    OK = "ok"
    """Nothing to do."""
    NOTE = "note"
    """ART works, but something of yours may not, or something isn't there that you may want."""
    WRONG = "wrong"
    """ART, or a script that uses it, is going to fail."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was looked at, what was found there, and what to do about it (empty: nothing)."""

    about: str
    state: State
    says: str
    mend: str = ""
