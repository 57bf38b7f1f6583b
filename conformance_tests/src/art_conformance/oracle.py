"""What a policy really says: transformers and PEFT in fp32, one whole sequence at a time, without any engine.

The checks hold engines, trainers and backends against it. Needs `art-conformance[oracle]`; without it the checks that
use it are untestable and say so.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .faults import PrerequisiteMissing

if TYPE_CHECKING:
    from .serving import Sample

_TINY = 256
# Adapters that are kept loaded; a suite holds its answers against hundreds, and against few at a time.
_HELD = 32


@dataclass(frozen=True)
class Agreement:
    """How far logprobs are from the oracle's: the mean absolute difference in nats, and the share of tokens whose
    probability ratio lies outside [0.9, 1.1].
    """

    mean: float
    outside: float
    tokens: int

    def __str__(self) -> str:
        return f"mean |Δ| {self.mean:.1e}, {self.outside:.1%} of {self.tokens} tokens outside [0.9, 1.1]"


class Oracle:
    """The base model, and any number of adapters on it, by folder (None: the base alone)."""

    def __init__(self, base_model: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.base_model = base_model
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base_model)
        self._torch = torch
        loader: Any = AutoModelForCausalLM
        self._base: Any = loader.from_pretrained(base_model, dtype=torch.float32).eval()
        if self._base.config.hidden_size <= _TINY:
            # On a busy machine several threads wait for each other far longer than so little work takes.
            torch.set_num_threads(1)
        self._adapted = functools.lru_cache(_HELD)(self.with_adapter)

    def next_logprobs(self, ids: Sequence[int], adapter: Path | None = None) -> NDArray[np.float32]:
        """Logprobs of every next token after each of `ids`: shape (len(ids), vocabulary), natural logarithm."""
        with self._torch.inference_mode():
            logits = self._model(adapter)(input_ids=self._torch.tensor([list(ids)])).logits[0].float()
            result: NDArray[np.float32] = self._torch.log_softmax(logits, -1).numpy()
        return result

    def logprobs(
        self, prompt: Sequence[int], sampled: Sequence[int], adapter: Path | None = None
    ) -> NDArray[np.float32]:
        """The logprob of each sampled token after what precedes it: shape (len(sampled),)."""
        table = self.next_logprobs([*prompt, *sampled], adapter)
        positions = np.arange(len(prompt) - 1, len(prompt) + len(sampled) - 1)
        picked: NDArray[np.float32] = table[positions, np.asarray(sampled, dtype=np.int64)]
        return picked

    def judge(self, samples: Sequence[Sample], adapter: Path | None) -> Agreement:
        """How the logprobs of samples agree with those of an adapter (None: the base)."""
        said, true = [], []
        for sample in samples:
            said += sample.logprobs
            true += self.logprobs(sample.prompt_ids, sample.ids, adapter).tolist()
        return agreement(said, true)

    def apart(self, samples: Sequence[Sample], adapter: Path | None, other: Path | None) -> float:
        """By how many nats a token two adapters differ in what they say of samples, on the mean."""
        each = [
            self.logprobs(s.prompt_ids, s.ids, adapter) - self.logprobs(s.prompt_ids, s.ids, other) for s in samples
        ]
        return float(np.abs(np.concatenate(each)).mean())

    def chat_ids(self, messages: list[Any], tools: list[Any] | None = None) -> list[int]:
        """The prompt's token ids by the model's own chat template, generation prompt included."""
        text = self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """What token ids read as, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _model(self, adapter: Path | None) -> Any:
        return self._base if adapter is None else self._adapted(adapter)

    def with_adapter(self, adapter: Path, *, is_trainable: bool = False) -> Any:
        """A model of its own with an adapter. The base's weights are shared: a model that holds many adapters takes
        longer over each further one.
        """
        with _installed():
            from peft import PeftModel
        shared = {id(parameter): parameter for parameter in self._base.parameters()}
        return PeftModel.from_pretrained(copy.deepcopy(self._base, shared), adapter, is_trainable=is_trainable).eval()


@functools.cache
def oracle_for(base_model: Path) -> Oracle:
    """The oracle of a base model, loaded once. Raises PrerequisiteMissing."""
    with _installed():
        return Oracle(base_model)


@contextmanager
def _installed() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise PrerequisiteMissing(
            f"this check needs the oracle, and {error.name} is missing: pip install 'art-conformance[oracle]'"
        ) from error


def agreement(said: Sequence[float], true: Sequence[float] | NDArray[np.float32]) -> Agreement:
    """How logprobs agree. Raises ValueError when their numbers differ or one is not finite."""
    if len(said) != len(true):
        raise ValueError(f"{len(said)} logprobs for {len(true)} tokens")
    if not said or not all(math.isfinite(value) for value in said):
        raise ValueError(f"there are no logprobs, or some are not finite: {said}")
    difference = np.asarray(said, dtype=np.float64) - np.asarray(true, dtype=np.float64)
    ratio = np.exp(difference)
    outside = float(np.mean((ratio < 0.9) | (ratio > 1.1)))
    return Agreement(float(np.mean(np.abs(difference))), outside, len(said))
