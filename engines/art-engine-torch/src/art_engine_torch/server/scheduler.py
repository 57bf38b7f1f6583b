"""Decides what each step computes: which pieces of which prompts, which running sequences, under which adapters.

Single-threaded: `step()` does one forward pass for everything that is due. A prompt is computed once for all samples
and all requests that share it; sequences that no longer fit in memory give way and are computed again later. Knows no
HTTP.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Final, cast

import numpy as np
import torch
from torch import Tensor

from .decoder import BatchPlan, Decoder, DecodeRows, PromptPiece
from .generation import GenerationRequest, Sequence, TopLogprobs
from .kv_cache import KVCache
from .logit_changes import changed_row
from .lora_batch import LoraAdapter, LoraBatch, LoraStack
from .prefix_cache import BLOCK, CachedPrefix, PrefixCache, Tokens, block_hashes, common_length
from .sampling import sample

logger = logging.getLogger(__name__)
KEPT_STACKS: Final = 4
# A prompt always moves on by this much in a step, however many sequences are running.
SMALLEST_PIECE: Final = 32


@dataclass(frozen=True)
class Limits:
    """`max_len`: tokens of one sequence; `max_sequences`: running at once; `batch_tokens`: rows of one forward pass;
    `cache_tokens` and `prefix_bytes`: memory for running sequences and for kept prefixes."""

    max_len: int
    max_sequences: int
    batch_tokens: int
    cache_tokens: int
    prefix_bytes: int


@dataclass(eq=False)
class _Prompt:
    """Tokens to be computed once, and the sequences that wait for them."""

    tokens: Tokens
    adapter: LoraAdapter | None
    uid: int
    hashes: list[int]
    sequences: list[Sequence] = field(default_factory=list)
    kv: Tensor | None = None
    done: int = 0

    @property
    def left(self) -> int:
        """Tokens that are still to be computed."""
        return len(self.tokens) - self.done

    @property
    def ends_with_it(self) -> bool:
        """Whether one token each is all that is wanted, so that nothing of it will run on."""
        return all(sequence.request.max_tokens == 1 for sequence in self.sequences)


@dataclass
class Counters:
    """Totals since the start.

    `changed_tokens` were drawn from other logits than the policy's own (a structure, a bias, penalties), of which
    `structured_tokens` within a structure; `allowed_logprob` is how likely the policy was to stay within it, as
    logarithms, summed over those.
    """

    steps: int = 0
    prompt_tokens: int = 0
    prompt_tokens_reused: int = 0
    sampled_tokens: int = 0
    changed_tokens: int = 0
    structured_tokens: int = 0
    allowed_logprob: float = 0.0
    preemptions: int = 0


class Scheduler:
    """Everything that runs or waits on one decoder."""

    def __init__(self, decoder: Decoder, limits: Limits) -> None:
        self.decoder = decoder
        self.limits = limits
        self.counters = Counters()
        self._cache = self._new_cache()
        self._prefixes = PrefixCache(limits.prefix_bytes)
        self._waiting: deque[_Prompt] = deque()
        self._started: list[_Prompt] = []
        # Sequences with a first token whose row in the cache is still to be given, with the keys and values to put
        # there.
        self._ready: deque[tuple[Sequence, Tensor]] = deque()
        self._prompts: dict[tuple[int, bytes], _Prompt] = {}
        self._lost: list[Sequence] = []
        self._stacks: OrderedDict[tuple[int, ...], LoraStack] = OrderedDict()
        self._loaded: set[int] = {0}

    @property
    def running(self) -> int:
        """Sequences that have begun."""
        return self._cache.occupied + len(self._ready) + sum(len(p.sequences) for p in self._started)

    @property
    def waiting(self) -> int:
        """Sequences whose prompt has not begun."""
        return sum(len(prompt.sequences) for prompt in self._waiting)

    @property
    def prefix_bytes(self) -> int:
        """Memory that kept prefixes take."""
        return self._prefixes.used

    def add(self, request: GenerationRequest) -> None:
        """Queues a request's samples; those with a prompt that is already queued or under way join it."""
        sequences = [
            Sequence(
                request,
                index,
                settings,
                text=None if request.text is None else request.text(),
                guide=None if request.guide is None else request.guide(),
            )
            for index, settings in enumerate(request.samples)
        ]
        self._prompt_for(request.prompt, request.adapter, request.uid).sequences.extend(sequences)

    @torch.inference_mode()
    def remove(self, request: GenerationRequest) -> None:
        """Stops a request's sequences, wherever they are; its listener hears that they were aborted."""
        for prompt in [*self._waiting, *self._started]:
            prompt.sequences = _without(prompt.sequences, request)
            if not prompt.sequences:
                self._drop_prompt(prompt)
        self._ready = deque((s, kv) for s, kv in self._ready if not _aborted(s, request))
        for sequence in self._occupants():
            if _aborted(sequence, request):
                self._cache.remove(sequence)

    def abort_all(self) -> None:
        """Stops everything; every listener hears that it was aborted."""
        for request in {id(s.request): s.request for s in self._everything()}.values():
            self.remove(request)

    def fail_all(self, reason: str) -> None:
        """Ends everything with an error, as when the engine itself is ending."""
        for sequence in self._everything():
            sequence.finish("error", reason=reason)

    @torch.inference_mode()
    def start_over(self, reason: str) -> None:
        """Forgets what was computed and ends everything with an error, after a step that failed somewhere on its way.

        Raises what the device raises when it is at its end; nobody has been told then.
        """
        self._lost = self._everything()
        self._waiting.clear()
        self._started.clear()
        self._ready.clear()
        self._prompts.clear()
        self._cache = self._new_cache()
        self._prefixes.clear()
        self._stacks.clear()
        self.decoder.probe()
        self.fail_all(reason)
        self._lost = []

    def adapter_loaded(self, uid: int) -> None:
        """From now on what this adapter computes may be kept."""
        self._loaded.add(uid)

    def adapter_unloaded(self, uid: int) -> None:
        """Drops what is kept for an adapter. Its running sequences go on: they hold its weights themselves."""
        self._loaded.discard(uid)
        self._prefixes.forget(uid)
        for key in [key for key in self._stacks if uid in key]:
            del self._stacks[key]

    @torch.inference_mode()
    def release_memory(self) -> None:
        """Gives all cache memory back. Running sequences go to the queue's front with the tokens that they have."""
        sequences = [*self._occupants(), *(s for s, _ in self._ready)]
        for prompt in reversed(self._started):
            prompt.kv, prompt.done = None, 0
            self._waiting.appendleft(prompt)
        self._started.clear()
        self._ready.clear()
        self._cache = self._new_cache()
        self._prefixes.clear()
        self._stacks.clear()
        for sequence in sequences:
            self._requeue(sequence)

    @torch.inference_mode()
    def step(self) -> bool:
        """One forward pass over what is due. False when there was nothing to do."""
        self._make_room()
        self._place_ready()
        rows, occupants = self._cache.plan()
        decoding = cast(list[Sequence], occupants)
        pieces = self._choose_pieces(len(decoding))
        if not decoding and not pieces:
            return False
        logits, sampling = self._forward(rows, decoding, pieces)
        for sequence in decoding:
            sequence.computed += 1
        for prompt, piece in pieces:
            prompt.done += piece.count
            self.counters.prompt_tokens += piece.count
        self.counters.steps += 1
        if sampling:
            self._sample(logits, sampling)
        for prompt in [prompt for prompt, _ in pieces if prompt.done == len(prompt.tokens)]:
            self._finish_prompt(prompt)
        return True

    def _forward(
        self, rows: list[DecodeRows], decoding: list[Sequence], pieces: list[tuple[_Prompt, PromptPiece]]
    ) -> tuple[Tensor, list[tuple[int, Sequence]]]:
        """Logits of the rows that are sampled from, and which sequence samples from which of them."""
        tokens = [np.array([s.tokens[-1] for s in decoding], dtype=np.int64)]
        positions = [np.array([s.computed for s in decoding], dtype=np.int64)]
        adapters: list[LoraAdapter | None] = [s.request.adapter for s in decoding]
        outputs = list(range(len(decoding)))
        sampling = list(enumerate(decoding))
        for prompt, piece in pieces:
            end = piece.start + piece.count
            tokens.append(prompt.tokens[piece.start : end].astype(np.int64))
            positions.append(np.arange(piece.start, end, dtype=np.int64))
            adapters += [prompt.adapter] * piece.count
            if end == len(prompt.tokens):
                sampling += [(len(outputs), sequence) for sequence in prompt.sequences]
                outputs.append(piece.offset + piece.count - 1)
        device = self.decoder.device
        plan = BatchPlan(rows, [piece for _, piece in pieces], torch.tensor(outputs, device=device, dtype=torch.int64))
        logits = self.decoder.forward(
            torch.from_numpy(np.concatenate(tokens)).to(device),
            torch.from_numpy(np.concatenate(positions)).to(device),
            plan,
            self._lora(adapters),
        )
        return logits, sampling

    def _sample(self, logits: Tensor, sampling: list[tuple[int, Sequence]]) -> None:
        chosen = [row for row, _ in sampling]
        if chosen != list(range(logits.shape[0])):
            logits = logits[torch.tensor(chosen, device=logits.device)]
        sequences = [sequence for _, sequence in sampling]
        changed = self._changed(logits, sequences)
        sampled = sample(logits, [s.settings for s in sequences], [len(s.tokens) for s in sequences], changed)
        self.counters.sampled_tokens += len(sampling)
        ended = []
        for i, sequence in enumerate(sequences):
            if sequence.ended is None:
                self._accept(sequence, sampled.tokens[i], sampled.logprobs[i], sampled.top.get(i, []))
            if sequence.ended is not None and sequence in self._cache:
                ended.append(sequence)
        # Broken ones first: giving a row back may move another one, and what is not finite must not be left behind.
        for sequence in sorted(ended, key=lambda s: s.ended != "error"):
            if sequence.ended == "error":
                self._cache.remove(sequence, clear=True)
            else:
                self._keep(sequence.all_tokens()[: sequence.computed], sequence.request.uid, sequence)
                self._cache.remove(sequence)

    def _accept(self, sequence: Sequence, token: int, logprob: float, top: TopLogprobs) -> None:
        try:
            sequence.accept(token, logprob, top)
        except Exception as error:  # what one request brought along must not end the others
            logger.exception("A sequence failed on its token.")
            sequence.finish("error", reason=f"{type(error).__name__}: {error}")

    def _changed(self, logits: Tensor, sequences: list[Sequence]) -> dict[int, Tensor]:
        """The rows that are drawn from other logits than their own. Ends sequences that cannot go on."""
        rows: dict[int, Tensor] = {}
        for i, sequence in enumerate(sequences):
            if not sequence.changed:
                continue
            request = sequence.request
            try:
                row = changed_row(logits[i], request.changes, sequence.guide, request.prompt, sequence.tokens)
            except RuntimeError as error:
                sequence.finish("error", reason=str(error))
                continue
            rows[i] = row.logits
            sequence.allowed_logprob += row.allowed_logprob
            self.counters.changed_tokens += 1
            if sequence.guide is not None:
                self.counters.structured_tokens += 1
                self.counters.allowed_logprob += row.allowed_logprob
        return rows

    def _finish_prompt(self, prompt: _Prompt) -> None:
        assert prompt.kv is not None
        self._started.remove(prompt)
        del self._prompts[prompt.uid, prompt.tokens.tobytes()]
        healthy = all(sequence.ended != "error" for sequence in prompt.sequences)
        if prompt.uid in self._loaded and healthy:
            self._prefixes.add(CachedPrefix(prompt.uid, prompt.tokens, prompt.kv))
        for sequence in prompt.sequences:
            sequence.computed = len(prompt.tokens)
            if sequence.ended is None:
                self._ready.append((sequence, prompt.kv))

    def _keep(self, tokens: Tokens, uid: int, sequence: Sequence) -> None:
        kv = self._cache.view(sequence)
        if uid in self._loaded and self._prefixes.wants(uid, tokens, kv.numel() * kv.element_size()):
            self._prefixes.add(CachedPrefix(uid, tokens, kv.clone()))

    def _choose_pieces(self, decoding: int) -> list[tuple[_Prompt, PromptPiece]]:
        """Pieces of prompts for this step, within its budget of rows: short ones for one token, then oldest first."""
        left = max(self.limits.batch_tokens - decoding, SMALLEST_PIECE)
        offset = decoding
        pieces: list[tuple[_Prompt, PromptPiece]] = []
        first, others = self._short_questions(left // 2)
        for prompt in [*first, *others]:
            if left <= 0:
                break
            if prompt.kv is None:
                if self.running >= self.limits.max_sequences and prompt not in first:
                    break
                if self._worth_waiting(prompt):
                    continue
                self._start(prompt)
            assert prompt.kv is not None
            count = min(left, prompt.left)
            pieces.append((prompt, PromptPiece(prompt.kv, offset, prompt.done, count)))
            offset += count
            left -= count
        return pieces

    def _short_questions(self, room: int) -> tuple[list[_Prompt], list[_Prompt]]:
        """Prompts for one token that fit into `room` rows, whole; and the others, oldest first.

        Such a one takes no place among the running, so it waits for none: a publication asks like this whether an
        adapter is the right one, while all places may be taken for long. What is left of the budget keeps the others
        moving.
        """
        first: list[_Prompt] = []
        others: list[_Prompt] = []
        for prompt in [*self._started, *self._waiting]:
            if prompt.ends_with_it and prompt.left <= room:
                first.append(prompt)
                room -= prompt.left
            else:
                others.append(prompt)
        return first, others

    def _worth_waiting(self, prompt: _Prompt) -> bool:
        """Whether a prompt under way will leave more of this one's start than there is now."""
        under_way = [p for p in self._started if p.uid == prompt.uid and p.hashes[:1] == prompt.hashes[:1]]
        if not prompt.hashes or not under_way:
            return False
        found = self._prefixes.find(prompt.uid, prompt.tokens, prompt.hashes)
        have = 0 if found is None else common_length(found.tokens, prompt.tokens)
        return any(common_length(p.tokens, prompt.tokens) >= have + 2 * BLOCK for p in under_way)

    def _start(self, prompt: _Prompt) -> None:
        shape, decoder = self.decoder.shape, self.decoder
        size = (shape.layers, 2, len(prompt.tokens), shape.kv_heads, shape.head_dim)
        prompt.kv = torch.empty(size, device=decoder.device, dtype=decoder.dtype)
        found = self._prefixes.find(prompt.uid, prompt.tokens, prompt.hashes)
        if found is not None:
            # The last token is computed in any case: its logits are what is asked for.
            prompt.done = min(common_length(found.tokens, prompt.tokens), len(prompt.tokens) - 1)
            prompt.kv[:, :, : prompt.done] = found.kv[:, :, : prompt.done]
            self.counters.prompt_tokens_reused += prompt.done
        self._waiting.remove(prompt)
        self._started.append(prompt)

    def _place_ready(self) -> None:
        while self._ready and self._cache.occupied < self.limits.max_sequences:
            sequence, kv = self._ready[0]
            if not self._cache.insert(sequence, kv):
                return
            self._ready.popleft()

    def _make_room(self) -> None:
        """Moves sequences that outgrew their lane; where memory is short, the youngest gives way."""
        for occupant in self._cache.outgrown():
            sequence = cast(Sequence, occupant)
            while sequence in self._cache and not self._cache.promote(sequence):
                youngest = self._occupants()[-1]
                self._cache.remove(youngest)
                self._requeue(youngest)
                self.counters.preemptions += 1

    def _requeue(self, sequence: Sequence) -> None:
        request = sequence.request
        prompt = self._prompt_for(sequence.all_tokens(), request.adapter, request.uid, first=True)
        prompt.sequences.append(sequence)

    def _prompt_for(self, tokens: Tokens, adapter: LoraAdapter | None, uid: int, *, first: bool = False) -> _Prompt:
        key = (uid, tokens.tobytes())
        prompt = self._prompts.get(key)
        if prompt is None:
            prompt = self._prompts[key] = _Prompt(tokens, adapter, uid, block_hashes(uid, tokens))
            if first:
                self._waiting.appendleft(prompt)
            else:
                self._waiting.append(prompt)
        return prompt

    def _drop_prompt(self, prompt: _Prompt) -> None:
        del self._prompts[prompt.uid, prompt.tokens.tobytes()]
        if prompt in self._started:
            self._started.remove(prompt)
        else:
            self._waiting.remove(prompt)

    def _lora(self, adapters: list[LoraAdapter | None]) -> LoraBatch | None:
        present = {adapter.uid: adapter for adapter in adapters if adapter is not None}
        if not present:
            return None
        key = tuple(sorted(present))
        stack = self._stacks.pop(key, None)
        if stack is None:
            shape = self.decoder.shape
            chosen = [present[uid] for uid in key]
            stack = LoraStack(chosen, shape.layers, shape.module_widths(), self.decoder.device, self.decoder.dtype)
        self._stacks[key] = stack
        while len(self._stacks) > KEPT_STACKS:
            self._stacks.popitem(last=False)
        column = {uid: index for index, uid in enumerate(key)}
        return stack.batch([len(key) if adapter is None else column[adapter.uid] for adapter in adapters])

    def _everything(self) -> list[Sequence]:
        queued = [s for prompt in [*self._waiting, *self._started] for s in prompt.sequences]
        return [*queued, *(s for s, _ in self._ready), *self._occupants(), *self._lost]

    def _occupants(self) -> list[Sequence]:
        """Running sequences with a row, in the order in which they were given it, as far as rows tell."""
        return cast(list[Sequence], self._cache.occupants())

    def _new_cache(self) -> KVCache:
        limits = self.limits
        decoder = self.decoder
        return KVCache(decoder.shape, decoder.device, decoder.dtype, limits.max_len, limits.cache_tokens)


def _aborted(sequence: Sequence, request: GenerationRequest) -> bool:
    if sequence.request is not request:
        return False
    sequence.finish("abort")
    return True


def _without(sequences: list[Sequence], request: GenerationRequest) -> list[Sequence]:
    return [sequence for sequence in sequences if not _aborted(sequence, request)]
