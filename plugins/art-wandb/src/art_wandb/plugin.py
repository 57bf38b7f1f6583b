"""The tracker's hooks: each hands what it is told to the reporter's thread. Imports nothing of wandb.

A model reports when its `report_metrics` names wandb, or says nothing and there is a key, or WANDB_MODE=offline.
"""

from __future__ import annotations

import os

from art_tracker_kit import LoggedModel, Reporter, reporting_hooks, reports_to

from .run import WandbRun, open_run

art_api = 1
NAME = "wandb"
reporter: Reporter[WandbRun] = Reporter(NAME, open_run)
#: wandb asks its service before it takes a table or another artifact. When that hangs, metrics still reach the run.
uploads: Reporter[WandbRun] = Reporter("wandb uploads", open_run)


def _reports(model: LoggedModel) -> bool:
    mode = os.environ.get("WANDB_MODE", "")
    if mode == "disabled":
        return False
    # A key that lies in ~/.netrc is used when wandb is asked for; that somebody once logged in asks for nothing.
    unasked = mode in ("offline", "dryrun") or bool(os.environ.get("WANDB_API_KEY"))
    return reports_to(model, NAME, unasked=unasked)


art_log_metrics, art_log_trajectories, art_checkpoint_published = reporting_hooks(reporter, _reports, uploads=uploads)
