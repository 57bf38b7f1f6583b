"""The tracker's hooks: each hands what it is told to the reporter's thread. Imports nothing of trackio.

A model reports when its `report_metrics` names trackio or says nothing; none does with ART_TRACKIO_MODE=disabled.
"""

from __future__ import annotations

import os

from art_tracker_kit import LoggedModel, Reporter, reporting_hooks, reports_to

from .run import TrackioRun, open_run

art_api = 1
NAME = "trackio"
MODE = "ART_TRACKIO_MODE"
reporter: Reporter[TrackioRun] = Reporter(NAME, open_run)


def _reports(model: LoggedModel) -> bool:
    return os.environ.get(MODE) != "disabled" and reports_to(model, NAME)


art_log_metrics, art_log_trajectories, art_checkpoint_published = reporting_hooks(reporter, _reports)
