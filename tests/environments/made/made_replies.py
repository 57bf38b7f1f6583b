"""A made taskset of one question and one answer: the shorter the answer, the better. Its program asks from here."""

from collections.abc import Iterator

import verifiers.v1 as vf
from openai import AsyncOpenAI
from verifiers.v1.dialects.chat import message_to_wire


class ReplyTask(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    @vf.reward(weight=2.0)
    async def is_short(self, trace: vf.Trace) -> float:
        return 1.0 / (1 + len(trace.last_reply))

    @vf.reward
    async def has_a_letter_e(self, trace: vf.Trace) -> float:
        return float("e" in trace.last_reply)

    @vf.metric
    async def letters(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply))


class Replies(vf.Taskset[ReplyTask, vf.TasksetConfig]):
    def load(self) -> Iterator[ReplyTask]:
        for name in ("colour", "fruit", "town", "bird"):
            yield ReplyTask(vf.TaskData(name=name, prompt=f"Name a {name}."), self.config.task)


class AskOnceConfig(vf.HarnessConfig):
    stream: bool = False


class AskOnce(vf.Harness[AskOnceConfig]):
    """Asks the model once a segment, with all that was said before."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):
        system, prompt = self.resolve_prompt(data)
        messages = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages += [message_to_wire(message) for message in prompt or ()]
        async with AsyncOpenAI(base_url=endpoint, api_key=secret, max_retries=0) as client:
            answer = await client.chat.completions.create(model=ctx.model, messages=messages, stream=self.config.stream)
            if self.config.stream:
                async for _ in answer:
                    continue
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


__all__ = ["AskOnce", "Replies"]
