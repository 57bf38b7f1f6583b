"""What is asked of the engine and what it answers, between the HTTP side and the engine's thread.

Token ids, numbers and text pieces only: chat templates, JSON and addresses stay on the HTTP side, tensors on the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np

from .detokenize import TextStream
from .logit_changes import LogitSettings
from .lora_batch import LoraAdapter
from .prefix_cache import Tokens
from .sampling import SamplingSettings
from .structure import Guide

FinishReason = Literal["stop", "length", "abort", "error"]
TopLogprobs = list[tuple[int, float]]
UNCHANGED: Final = LogitSettings()


@dataclass(frozen=True)
class SequenceUpdate:
    """News of sample `index` of a request: the tokens since the last news, and, once, how it ended.

    A streaming request hears of every token; any other hears once, at the end. `text` is set where the engine
    detokenizes (streams, and requests with stop strings). `reason` is the stop string or stop token id that ended it,
    or an error's text. `allowed_logprob`, at the end, is the sum over all tokens of how likely the policy's own next
    token was to be one that the structure allowed, as logarithms.
    """

    index: int
    tokens: list[int]
    logprobs: list[float]
    top: list[TopLogprobs]
    text: str | None = None
    finished: FinishReason | None = None
    reason: str | int | None = None
    allowed_logprob: float = 0.0


@dataclass(eq=False)
class GenerationRequest:
    """One prompt and its samples. `listener` is called in the engine's thread and must only hand over.

    `end_ids` end a sequence without being named as a reason, `stop_ids` are the user's. `max_tokens` bounds each
    sample. `changes` and the guide that `guide` makes for each sample change what tokens are drawn from. Raises
    ValueError for a prompt without a token: after nothing there is nothing to say.
    """

    prompt: Tokens
    adapter: LoraAdapter | None
    samples: list[SamplingSettings]
    max_tokens: int
    listener: Callable[[SequenceUpdate], None]
    end_ids: frozenset[int] = frozenset()
    stop_ids: frozenset[int] = frozenset()
    streaming: bool = False
    text: Callable[[], TextStream] | None = None
    changes: LogitSettings = UNCHANGED
    guide: Callable[[], Guide] | None = None

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise ValueError("the prompt has no tokens")

    def fail(self, reason: str) -> None:
        """Tells the listener that no sample will come."""
        for index in range(len(self.samples)):
            self.listener(SequenceUpdate(index, [], [], [], None, "error", reason))

    @property
    def uid(self) -> int:
        """The adapter's uid, 0 for the base model."""
        return 0 if self.adapter is None else self.adapter.uid


@dataclass(eq=False)
class Sequence:
    """One running sample. `computed` counts the tokens, prompt included, whose keys and values are stored."""

    request: GenerationRequest
    index: int
    settings: SamplingSettings
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[TopLogprobs] = field(default_factory=list)
    computed: int = 0
    told: int = 0
    text: TextStream | None = None
    guide: Guide | None = None
    allowed_logprob: float = 0.0
    ended: FinishReason | None = None

    @property
    def changed(self) -> bool:
        """Whether its tokens are drawn from other logits than the policy's own."""
        return self.guide is not None or self.request.changes.change

    def all_tokens(self) -> Tokens:
        """Prompt and sampled tokens."""
        return np.concatenate([self.request.prompt, np.array(self.tokens, dtype=np.int32)])

    def accept(self, token: int, logprob: float, top: TopLogprobs) -> bool:
        """Takes a sampled token, tells the listener what it is owed, and says whether the sequence has ended."""
        if logprob != logprob:
            self.finish("error", reason="the logits were not finite, so no token could be sampled")
            return True
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.top.append(top)
        request = self.request
        if token in request.end_ids or token in request.stop_ids:
            self.finish("stop", reason=None if token in request.end_ids else token)
            return True
        text, hit = self.text.push(token) if self.text is not None else (None, None)
        if hit is not None:
            self.finish("stop", reason=hit or None, text=text)
            return True
        if self.guide is not None:
            self.guide.accept(token)
            # Where no token may end an answer, the end of the structure does.
            if self.guide.ended and not request.end_ids:
                self.finish("stop", text=text)
                return True
        if len(self.tokens) >= request.max_tokens:
            self.finish("length", text=text)
            return True
        if request.streaming:
            self._tell(text)
        return False

    def finish(self, how: FinishReason, *, reason: str | int | None = None, text: str | None = None) -> None:
        """Ends the sequence and tells the listener, once."""
        if self.ended is not None:
            return
        self.ended = how
        if self.text is not None:
            text = (text or "") + self.text.flush()
            if not self.request.streaming:
                text = self.text.text
        self._tell(text, how, reason)

    def _tell(self, text: str | None, finished: FinishReason | None = None, reason: str | int | None = None) -> None:
        since, self.told = self.told, len(self.tokens)
        news = SequenceUpdate(
            self.index,
            self.tokens[since:],
            self.logprobs[since:],
            self.top[since:],
            text,
            finished,
            reason,
            self.allowed_logprob,
        )
        self.request.listener(news)
