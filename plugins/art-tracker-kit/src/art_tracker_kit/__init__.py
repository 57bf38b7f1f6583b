"""What trackers share whose library talks to a service or a database of its own, and so may be slow, hang or fail.

Knows hooks' arguments and no library that tracks: a `Reporter` is handed a function that opens a run.
"""

from __future__ import annotations

from .adapter_files import adapter_files
from .reported import LoggedModel, reports_to
from .reporter import Reporter, Run, TrackerBehind
from .reporting_hooks import ReportingHooks, TrackedRun, reporting_hooks
from .tables import COLUMNS, ROWS, TEXT, Table, table_of

__all__ = [
    "COLUMNS",
    "ROWS",
    "TEXT",
    "LoggedModel",
    "Reporter",
    "ReportingHooks",
    "Run",
    "Table",
    "TrackedRun",
    "TrackerBehind",
    "adapter_files",
    "reporting_hooks",
    "reports_to",
    "table_of",
]
