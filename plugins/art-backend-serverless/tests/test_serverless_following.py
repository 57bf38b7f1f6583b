"""A job is followed to the same end however its events are cut into pages, repeated, and the connection with them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import art
from art_backend_serverless import Patience, ServerlessBackend
from art_core.errors import TrainingFailed

LOSSES = st.lists(st.floats(-10, 10), min_size=0, max_size=6)
#: What happens to the answer of a look at the events; None answers as it should.
HAPPENINGS = st.lists(
    st.sampled_from([None, "again from the start", "one at a time", "truncated", "cut", "502", "429", "empty"]),
    max_size=12,
    # A fourth answer in a row that nobody can read is the end, and that is right.
).filter(lambda happenings: happenings.count("truncated") < 4)


def instead(cloud: Any, happening: str) -> Callable[[Any], Any]:
    async def answer(asked: Any) -> Any:
        job_id = asked.path.split("/")[-2]
        if happening in ("502", "429"):
            return cloud.answer({"detail": "not now"}, int(happening))
        if happening == "again from the start":
            return cloud.answer({"data": cloud.jobs[job_id][:3]})
        if happening == "empty":
            return cloud.answer({"data": [], "has_more": True})
        whole = cloud.handle(replace(asked, query={**asked.query, "limit": "1"}))
        if happening == "one at a time":
            return whole
        cut = whole.body[: len(whole.body) // 2]
        return replace(whole, body=cut, announced=len(whole.body) if happening == "cut" else None)

    return answer


@pytest.mark.slow
@settings(max_examples=40)
@given(losses=LOSSES, happenings=HAPPENINGS, ends_well=st.booleans())
def test_whatever_happens_on_the_way(
    new_cloud: Callable[[], Any], patience: Patience, losses: list[float], happenings: list[str | None], ends_well: bool
) -> None:
    async def run() -> None:
        async with new_cloud() as cloud:
            backend = ServerlessBackend(cloud.key, cloud.base_url, patience=patience, show_progress=False)
            model = art.TrainableModel(name="m", project="p", base_model="b")
            await model.register(backend)
            steps = [("gradient_step", {"metrics": {"loss/train": loss}}) for loss in losses]
            end = ("training_ended", {}) if ends_well else ("training_failed", {"error_message": "no room"})
            cloud.scripts.append([("training_started", {"num_sequences": 2}), *steps, end])
            for happening in happenings:
                path = "/v1/preview/training-jobs/.*/events"
                cloud.fails("GET", path, **({} if happening is None else {"instead": instead(cloud, happening)}))
            if not ends_well:
                with pytest.raises(TrainingFailed, match="no room"):
                    await backend.train(model, [])
                return
            result = await backend.train(model, [])
            assert result.step == 1
            assert result.metrics["data/step_num_gradient_steps"] == len(losses)
            if losses:
                assert result.metrics["loss/train"] == pytest.approx(sum(losses) / len(losses))

    asyncio.run(run())
