"""A made taskset with a tool: a program of verifiers asks, calls the tool over MCP, and asks again."""

from collections.abc import Iterator

import verifiers.v1 as vf


class LookUp(vf.Toolset[vf.ToolsetConfig, vf.State]):
    TOOL_PREFIX = None

    @vf.tool
    async def look_up(self, city: str) -> str:
        """The weather in a city."""
        return f"It rains in {city}."


class LookUpTask(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def looked_up(self, trace: vf.Trace) -> float:
        said = [message.content for message in trace.tool_messages]
        return float("It rains in Paris." in str(said)) * len(trace.last_reply or "x")

    @classmethod
    def toolsets(cls, config: vf.TaskConfig) -> list[vf.Toolset]:
        return [LookUp(vf.ToolsetConfig())]


class Weather(vf.Taskset[LookUpTask, vf.TasksetConfig]):
    def load(self) -> Iterator[LookUpTask]:
        yield LookUpTask(vf.TaskData(prompt="What is the weather in Paris?"), self.config.task)


__all__ = ["Weather"]


if __name__ == "__main__":
    LookUp.run()
