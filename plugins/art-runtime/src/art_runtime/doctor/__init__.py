"""`art doctor`: what is wrong with this machine, this environment and this folder, and the line that mends each thing.

Each check looks and changes nothing. Knows no run and no host; those are `art ps`'s.
"""

from __future__ import annotations

from .examination import examine_all
from .finding import Finding, State

__all__ = ["Finding", "State", "examine_all"]
