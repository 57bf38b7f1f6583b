"""What is asked of the engine and what it answers, between the HTTP side and the engine's thread.

Token ids, numbers and text pieces only: chat templates, JSON and addresses stay on the HTTP side, tensors on the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .detokenize import TextStream
from .lora_batch import LoraAdapter
from .prefix_cache import Tokens
from .sampling import SamplingSettings

FinishReason = Literal["stop", "length", "abort", "error"]
TopLogprobs = list[tuple[int, float]]


@dataclass(frozen=True)
class SequenceUpdate:
    """News of sample `index` of a request: the tokens since the last news, and, once, how it ended.

    A streaming request hears of every token; any other hears once, at the end. `text` is set where the engine
    detokenizes (streams, and requests with stop strings). `reason` is the stop string or stop token id that ended it,
    or an error's text.
    """

    index: int
    tokens: list[int]
    logprobs: list[float]
    top: list[TopLogprobs]
    text: str | None = None
    finished: FinishReason | None = None
    reason: str | int | None = None


@dataclass(eq=False)
class GenerationRequest:
    """One prompt and its samples. `listener` is called in the engine's thread and must only hand over.

    `end_ids` end a sequence without being named as a reason, `stop_ids` are the user's. `max_tokens` bounds each
    sample.
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
    ended: FinishReason | None = None

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
            self.finish("stop", reason=hit, text=text)
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
            self.index, self.tokens[since:], self.logprobs[since:], self.top[since:], text, finished, reason
        )
        self.request.listener(news)
