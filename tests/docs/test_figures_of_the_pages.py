"""Figures that pages promise are those of the code: a limit that is changed is changed on its page."""

from __future__ import annotations

from pathlib import Path

import pytest

import art.first_answer
import art.openai_client
import art.progress
import art_tracker_kit.reporter
import art_tracker_kit.tables
from art.pipeline_trainer import keep_recent_and_top
from art_backend_local.servers import standstill
from art_backend_serverless import Patience
from art_backend_serverless.backend import LOGS_LIMIT_S
from art_core.trajectories import LARGEST_REWARD

DOCS = Path(__file__).parents[2] / "docs"
NEVER_ANSWERED, NOT_ENDING = "| a first request that isn't answered |", "| a rollout that doesn't end |"
FIGURES = [
    ("faults.md", "beyond 1e150", LARGEST_REWARD, 1e150),
    ("faults.md", f"{NOT_ENDING} nothing ends it but your own timeout or Ctrl-C; while no other ends, the one that has"
     " run longest is named every ten seconds", art.progress.PLAIN_EVERY_S, 10),
    ("faults.md", f"{NEVER_ANSWERED} after ten seconds", art.first_answer.SAY_AFTER_S, 10),
    ("faults.md", "when it is given up (1,200 s)", art.openai_client.REQUEST_TIMEOUT_S, 1200),
    ("faults.md", "questions are asked again for three minutes", Patience().request_s, 180),
    ("faults.md", "| a job is silent for an hour |", Patience().job_silence_s, 3600),
    ("serverless.md", "Questions are asked again for three minutes", Patience().request_s, 180),
    ("serverless.md", "After an hour without an event", Patience().job_silence_s, 3600),
    ("serverless.md", "is tried for thirty seconds", LOGS_LIMIT_S, 30),
    ("trackers.md", "a queue of 256 reports", art_tracker_kit.reporter.ROOM, 256),
    ("trackers.md", "at most every 30 seconds", art_tracker_kit.reporter.AGAIN_AFTER_S, 30),
    ("trackers.md", "is sent for at most 60 seconds", art_tracker_kit.reporter.CLOSING_LIMIT_S, 60),
    ("trackers.md", "at most 100 rows", art_tracker_kit.tables.ROWS, 100),
    ("trackers.md", "at most 2,000 characters", art_tracker_kit.tables.TEXT, 2000),
]  # fmt: skip


@pytest.mark.parametrize(("page", "words", "found", "figure"), FIGURES, ids=[words[-40:] for _, words, *_ in FIGURES])
def test_the_figure_is_the_one_of_the_code(page: str, words: str, found: float, figure: float) -> None:
    assert words in " ".join((DOCS / page).read_text(encoding="utf-8").split())
    assert found == figure


def test_what_stands_still_is_ended_within_two_minutes() -> None:
    assert "it is ended and started again within two minutes" in (DOCS / "faults.md").read_text(encoding="utf-8")
    assert standstill.limit_s() <= 120


def test_the_strategy_that_the_page_of_pipelines_names_is_the_one_by_default() -> None:
    text = (DOCS / "pipeline.md").read_text(encoding="utf-8")
    assert '`keep_recent_and_top(recent=5, top=2, metric="val/reward")`' in text
    assert keep_recent_and_top() == keep_recent_and_top(recent=5, top=2, metric="val/reward")
