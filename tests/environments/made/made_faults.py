"""A made taskset whose tasks fail in the ways in which tasks do; its own program asks by another interface."""

from collections.abc import Iterator
from typing import Literal

import verifiers.v1 as vf
from made_replies import AskOnce
from openai import AsyncOpenAI


class Fault(vf.TaskData):
    kind: Literal["reward", "setup", "silent"]


class FaultyTask(vf.Task[Fault, vf.State, vf.TaskConfig]):
    async def setup(self, trace: vf.Trace, runtime: vf.Runtime) -> None:
        if self.data.kind == "setup":
            raise OSError("the data set is gone")

    @vf.reward
    async def broken(self) -> float:
        if self.data.kind == "reward":
            raise ZeroDivisionError("nothing to divide by")
        return 1.0


class Faults(vf.Taskset[FaultyTask, vf.TasksetConfig]):
    def load(self) -> Iterator[FaultyTask]:
        for kind in ("reward", "setup"):
            yield FaultyTask(Fault(prompt="?", kind=kind), self.config.task)


class AskAnotherWay(AskOnce):
    """Asks by the Responses API, which ART's models don't answer."""

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):
        async with AsyncOpenAI(base_url=endpoint, api_key=secret, max_retries=0) as client:
            await client.responses.create(model=ctx.model, input=data.prompt)
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


__all__ = ["AskAnotherWay", "Faults"]
