"""What a service says that it can do is asked until the answer can be read: nothing is remembered of a broken one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

JOBS = "/v1/preview/training-jobs"
ABLE = {"entity": None, "fork": True, "pull": True, "uploads": True}


@pytest.mark.parametrize("broken", [b"", b'{"uploads": tr', b'{"uploads": true'])
async def test_a_broken_answer_about_what_a_service_can_do_is_asked_for_again(
    cloud: Any, serverless: Any, model: Any, groups: Any, broken: bytes
) -> None:
    said = [broken, broken]

    async def tell(asked: Any) -> Any:
        whole = cloud.answer(ABLE, Content_Type="application/json")
        return replace(whole, body=said.pop()) if said else whole

    async def gone(asked: Any) -> Any:
        return cloud.answer({"detail": "nobody is there"}, 502)

    cloud.fails("GET", ".*/capabilities", times=3, instead=tell)
    # Who knows idempotency keys is sent a job again whose fate is unknown.
    cloud.fails("POST", JOBS, instead=gone)
    assert (await serverless.train(model, groups)).step == 1
    first, second = cloud.calls("POST", JOBS)
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]


async def test_a_page_of_somebody_else_is_no_such_answer_and_remembered(
    cloud: Any, serverless: Any, model: Any, groups: Any
) -> None:
    async def page(asked: Any) -> Any:
        return replace(cloud.answer(None, Content_Type="text/html"), body=b"<html>welcome</html>")

    cloud.fails("GET", ".*/capabilities", times=2, instead=page)
    for step in (1, 2):
        assert (await serverless.train(model, groups)).step == step
    assert len(cloud.calls("GET", ".*/capabilities")) == 1
