"""How an engine shows that it serves a checkpoint and no other: its answers held against the checkpoint's canary.

Pure arithmetic on requests and answers; whoever publishes makes the calls.

The rule. For each canary prompt the engine is asked for one token at temperature 0, with its logprob, which is held
against what the trainer expects of that token. The checkpoint is refused when the mean absolute difference exceeds
`TOLERANCE`; when the previous adapter explains the answers better although the two adapters differ by more than
`SIGNIFICANT`; or when the previous adapter explains them `FAR_BETTER` times as well and the new one is off by more than
`EXACT`, which catches a stale adapter after a small step on an engine that computes as the trainer does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from art_engine_kit.canary import Canary, CanaryPrompt

# bf16 engines differ from an fp32 trainer by 0.03 to 0.05 in the mean over tokens; a wrong adapter by far more.
TOLERANCE = 0.2
SIGNIFICANT = 0.1
FAR_BETTER = 3.0
EXACT = 1e-3
# The most likely token is not among those the trainer found most likely: as wrong as can be.
UNEXPECTED_TOKEN = 1.0

JSON = dict[str, Any]


@dataclass(frozen=True)
class CanaryReading:
    """Mean absolute differences in nats: of the answers to the new adapter's expectation, of the answers to the
    previous one's, and between those two. The last two are None when the canary has no previous adapter.
    """

    to_new: float
    to_previous: float | None
    between: float | None

    @property
    def problem(self) -> str:
        """Why the answers are not those of the new adapter; empty when they are."""
        if self.to_new > TOLERANCE:
            return f"the engine's logprobs are off by {self.to_new:.4f} in the mean, more than {TOLERANCE}"
        if self.to_previous is None or self.between is None:
            return ""
        if self.between > SIGNIFICANT and self.to_previous < self.to_new:
            return (
                f"the engine answers as the previous adapter (off by {self.to_previous:.4f}) rather than as the new one"
                f" (off by {self.to_new:.4f})"
            )
        if self.to_new > EXACT and self.to_previous * FAR_BETTER < self.to_new:
            return (
                f"the engine answers as the previous adapter (off by {self.to_previous:.6f}), not as the new one (off"
                f" by {self.to_new:.6f})"
            )
        return ""


def canary_request(prompt: CanaryPrompt) -> JSON:
    """The body for /v1/completions that shows an engine's most likely next token and its logprob."""
    return {"prompt": list(prompt.token_ids), "max_tokens": 1, "temperature": 0, "logprobs": 1}


def first_token(body: JSON) -> tuple[int, float]:
    """Token id and logprob of the first token in a normalized answer. Raises ValueError when it has none."""
    try:
        choice = body["choices"][0]
        token = int(choice["token_ids"][0])
        logprobs = choice["logprobs"]
        content = logprobs.get("content")
        value = content[0]["logprob"] if content else logprobs["token_logprobs"][0]
        return token, float(value)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"the engine's answer to a canary prompt has no token id with a logprob ({error!r})"
        ) from error


def read_canary_answers(canary: Canary, answers: list[tuple[int, float]]) -> CanaryReading:
    """Compare one (token id, logprob) for each prompt with what the canary says."""
    to_new = to_previous = between = 0.0
    with_previous = 0
    for prompt, (token, logprob) in zip(canary.prompts, answers, strict=True):
        if token not in prompt.expected:
            to_new += max(UNEXPECTED_TOKEN, abs(logprob - min(prompt.expected.values(), default=0.0)))
        else:
            to_new += abs(logprob - prompt.expected[token])
        if prompt.previous:
            with_previous += 1
            old = prompt.previous.get(token)
            to_previous += UNEXPECTED_TOKEN if old is None else abs(logprob - old)
            common = prompt.expected.keys() & prompt.previous.keys()
            between += sum(abs(prompt.expected[t] - prompt.previous[t]) for t in common) / max(1, len(common))
    count = len(canary.prompts)
    if with_previous < count:
        return CanaryReading(to_new / max(1, count), None, None)
    return CanaryReading(to_new / max(1, count), to_previous / max(1, count), between / max(1, count))
