"""What tokens read as, for every kind of tokenizer that a model's folder may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from art_engine_torch.server.structure import compile_grammar, json_rule
from art_engine_torch.server.vocabulary import Vocabulary

LETTERS = [chr(code) for code in range(32, 127)]
OBJECT = '{"a": 1}'


def by_word(decoder: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0} | {c: i for i, c in enumerate(LETTERS, 1)}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


def by_byte() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"</s>": 0} | {c: i for i, c in enumerate(alphabet, 1)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def by_piece() -> Tokenizer:
    pieces = [("</s>", 0.0), ("\u2581", -1.0), *((letter, -2.0) for letter in LETTERS[1:])]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    return tokenizer


@pytest.mark.parametrize(
    "made",
    [by_word(decoders.Fuse()), by_word(None), by_word(decoders.WordPiece()), by_byte(), by_piece()],
    ids=["fused", "no decoder", "word pieces", "bytes", "pieces"],
)
def test_tokens_of_any_kind_are_read_and_guided(tmp_path: Path, made: Tokenizer) -> None:
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>").save_pretrained(tmp_path)
    vocabulary = Vocabulary(tmp_path, size=300)
    ids = vocabulary.tokenizer(OBJECT, add_special_tokens=False)["input_ids"]
    assert b"".join(bytes(vocabulary.token_bytes(token)) for token in ids).decode() == OBJECT
    assert vocabulary.token_bytes(299) == []
    guide = compile_grammar(vocabulary.guides, [json_rule({"type": "object"}, strict=False)]).guide()
    for token in ids:
        assert guide.allowed(300)[token], vocabulary.token_text(token)
        guide.accept(token)
    assert guide.allowed(300)[vocabulary.tokenizer.eos_token_id]
