"""What a model's tokens read as, which of them end an answer, and how much text they can hold.

Knows the tokenizer and the model's folder. Prompts are written elsewhere: nothing here takes long.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from llguidance import LLTokenizer, TokenizerWrapper
from llguidance.hf import from_tokenizer
from transformers import AutoTokenizer, GenerationConfig


class Vocabulary:
    """The tokenizer of a model folder. `end_ids` are the token ids that end an answer, `size` is the number of the
    model's logits, for the last of which there may be no token.
    """

    def __init__(self, folder: Path, *, size: int) -> None:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.tokenizer = tokenizer
        self.size = size
        ends = {tokenizer.eos_token_id}
        if (folder / "generation_config.json").is_file():
            configured = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
            ends |= set(configured) if isinstance(configured, list) else {configured}
        self.end_ids = frozenset(end for end in ends if isinstance(end, int) and 0 <= end < size)
        self._bytes = _token_bytes(tokenizer, size)
        self._longest = max(map(len, self._bytes))

    def most_characters(self, tokens: int) -> int:
        """How many characters no text of so many tokens exceeds. A normalizer may have made several into one."""
        return 4 * self._longest * tokens

    @functools.lru_cache(maxsize=65536)  # noqa: B019 - one vocabulary lives as long as the process
    def token_text(self, token: int) -> str:
        """How a single token reads, special ones included; a part of a character reads as U+FFFD."""
        return str(self.tokenizer.decode([token], skip_special_tokens=False))

    def token_bytes(self, token: int) -> list[int]:
        """The token's own bytes, special ones included; those of an answer's tokens, joined, are its text."""
        return list(self._bytes[token])

    def text(self, tokens: list[int]) -> str:
        """How tokens read together, without special ones."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    @functools.cached_property
    def guides(self) -> LLTokenizer:
        """The tokens as grammars see them. Made at first use, which takes half a second."""
        return LLTokenizer(TokenizerWrapper(_Spelled(self)), eos_token=sorted(self.end_ids) or None)


class _Spelled:
    """The tokens by their bytes, as TokenizerWrapper wants them.

    llguidance takes every added token for a special one, which no text can hold. Those that are not, as <tool_call> is
    in many models, are here what they read as.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._tokenizer = tokenizer = vocabulary.tokenizer
        self.tokens = vocabulary._bytes
        self.eos_token_id = min(vocabulary.end_ids, default=tokenizer.eos_token_id or 0)
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]

    def __call__(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _token_bytes(tokenizer: Any, size: int) -> list[bytes]:
    """The bytes of each token, none for a logit that no token stands for."""
    tokens = range(min(max(tokenizer.get_vocab().values()) + 1, size))
    try:
        spelled = from_tokenizer(tokenizer)
    except ValueError:
        # llguidance reads byte-level and byte-fallback tokenizers. Of any other kind, a token is what it reads as.
        known = [str(tokenizer.decode([token])).encode() for token in tokens]
    else:
        known = [spelled.decode_bytes([token]) for token in tokens]
    for token, found in enumerate(known):
        # llguidance keeps the byte FF, which no text holds, for marks of its own.
        if not found and tokenizer.decode([token]) == "\ufffd":
            known[token] = b"\xff"
    return known + [b""] * (size - len(known))
