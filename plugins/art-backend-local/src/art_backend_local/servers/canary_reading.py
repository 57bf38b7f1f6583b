"""How an engine shows that it serves a checkpoint and no other: its answers held against the checkpoint's canary.

Pure arithmetic on requests and answers; whoever publishes makes the calls.

The rule. For each canary prompt the engine is asked for one token at temperature 0, with its logprob. The errors are
what it said less what the checkpoint expects. The checkpoint is refused when they are larger than `TOLERANCE` in the
mean. Smaller ones are looked at for a reason, by least squares: a stale adapter errs by what the last step changed, a
wrong strength in proportion to all that the adapter does. Errors that one of these explains so well that chance doesn't
(an F statistic above `BEYOND_CHANCE`) refuse it too. What is left unexplained measures how exactly this very engine
computes, so that a stale adapter is found out after the smallest step on one that computes as the trainer does, and
rounding is never taken for one on an engine in bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from art_engine_kit.canary import Canary, CanaryPrompt

# bf16 engines differ from an fp32 trainer by 0.03 to 0.1 in the mean over tokens; a wrong adapter by far more.
TOLERANCE = 0.2
# Chance alone reaches it less than once in a million publications, with ten prompts and errors of a normal kind.
BEYOND_CHANCE = 150.0
# What is left unexplained has to be told from what is explained.
_FREE_PROMPTS = 3
# With fewer prompts: as near to the previous adapter as only the same arithmetic on the same weights comes.
_SAME = 1e-4
_NOT_SAME = 10.0
# Below this the two adapters do the same, or the engine computes no more exactly than that.
_NOTHING = 2e-5
# The most likely token is not among those the trainer found most likely: as wrong as can be.
UNEXPECTED_TOKEN = 1.0

JSON = dict[str, Any]
CanaryAnswer = tuple[int, float]
_Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CanaryReading:
    """Mean absolute differences in nats of the answers: to the new adapter's expectation, and to the previous one's.

    Where the errors have a reason, `missing` is how much of the last step is missing (1: all of it) or `strength` how
    strongly the adapter is applied, whichever explains more, and `explained` how much beyond chance. What the canary
    doesn't tell is None.
    """

    to_new: float
    to_previous: float | None = None
    missing: float | None = None
    strength: float | None = None
    explained: float | None = None

    @property
    def problem(self) -> str:
        """Why the answers are not those of the new adapter; empty when they are."""
        off = f"off by {self.to_new:.6f}"
        previous = (
            f"the engine answers as the previous adapter (off by {self.to_previous or 0.0:.6f}), not as the new one"
            f" ({off})"
        )
        if self.to_new > TOLERANCE:
            return f"the engine's logprobs are off by {self.to_new:.4f} in the mean, more than {TOLERANCE}"
        if self.explained is None:
            same = self.to_previous is not None and self.to_previous < _SAME
            return previous if same and self.to_new > _NOT_SAME * (self.to_previous or _NOTHING) else ""
        if self.to_new < _NOTHING or self.explained < BEYOND_CHANCE:
            return ""
        if self.missing is not None:
            return previous if self.missing > 0.9 else f"{self.missing:.0%} of the last step is missing in the answers"
        return (
            f"the engine applies the adapter at {self.strength:.3g} times its strength ({off}): it"
            " must be scaled by lora_alpha / r, with use_rslora by lora_alpha / sqrt(r)"
        )


def canary_request(*prompts: Sequence[int]) -> JSON:
    """The body for /v1/completions that shows an engine's most likely next token after each prompt, with its logprob.

    Prompts are token ids; several are one question, with a choice for each.
    """
    asked = [list(token_ids) for token_ids in prompts]
    return {"prompt": asked[0] if len(asked) == 1 else asked, "max_tokens": 1, "temperature": 0, "logprobs": 1}


def first_tokens(body: JSON) -> list[CanaryAnswer]:
    """The first token of every choice of a normalized answer, in their order. Raises ValueError as `first_token`."""
    choices = sorted(body.get("choices") or [], key=lambda choice: int(choice.get("index") or 0))
    return [first_token({"choices": [choice]}) for choice in choices]


def first_token(body: JSON) -> CanaryAnswer:
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


def read_canary_answers(canary: Canary, answers: Sequence[CanaryAnswer]) -> CanaryReading:
    """Compare one (token id, logprob) for each prompt with what the canary says."""
    pairs = list(zip(canary.prompts, answers, strict=True))
    known = [(prompt, token, logprob) for prompt, (token, logprob) in pairs if token in prompt.expected]
    errors = np.array([logprob - prompt.expected[token] for prompt, token, logprob in known])
    unexpected = sum(
        max(UNEXPECTED_TOKEN, abs(logprob - min(prompt.expected.values(), default=0.0)))
        for prompt, (token, logprob) in pairs
        if token not in prompt.expected
    )
    to_new = (float(np.abs(errors).sum()) + unexpected) / max(1, len(pairs))
    if len(known) < len(pairs):
        return CanaryReading(to_new)
    step = _change(known, [prompt.previous for prompt, _, _ in known])
    whole = _change(known, [prompt.base for prompt, _, _ in known])
    to_previous = None if step is None else float(np.abs(errors + step).mean())
    return CanaryReading(to_new, to_previous, *_explain(errors, step, whole, canary.exact_to))


def _change(
    known: Sequence[tuple[CanaryPrompt, int, float]], before: Sequence[dict[int, float] | None]
) -> _Vector | None:
    """By how much the new adapter's expectation of each answered token differs from another's; None when unknown."""
    values = [
        prompt.expected[token] - other[token]
        for (prompt, token, _), other in zip(known, before, strict=True)
        if other and token in other
    ]
    return np.array(values) if len(values) == len(known) and values else None


def _explain(
    errors: _Vector, step: _Vector | None, whole: _Vector | None, exact_to: float
) -> tuple[float | None, float | None, float | None]:
    """errors ≈ -missing · step + (strength - 1) · whole: the coefficient that explains more alone, None for the other,
    and the F statistic of both together.
    """
    # A step that changed nothing, or an adapter that does nothing, explains nothing.
    directions = [d for d in (step, whole) if d is not None and np.abs(d).max() > _NOTHING]
    if not directions:
        return None, None, None
    matrix = np.stack([d / np.linalg.norm(d) for d in directions], axis=1)
    found, _, rank, _ = np.linalg.lstsq(matrix, errors, rcond=1e-3)
    free = len(errors) - int(rank)
    if free < _FREE_PROMPTS:
        return None, None, None
    rest = errors - matrix @ found
    gain = float(errors @ errors) - float(rest @ rest)
    noise = max(float(rest @ rest) / free, exact_to**2, (_NOTHING / 10) ** 2)
    explained = gain / int(rank) / noise
    best = directions[int(np.argmax(np.abs(errors @ matrix)))]
    share = float(errors @ best / (best @ best))
    # After a first step from nothing the two are one: what is missing whole is the step, what is there in part is weak.
    if best is step and (rank == len(directions) or share < -0.9):
        return -share, None, explained
    return None, 1 + share, explained
