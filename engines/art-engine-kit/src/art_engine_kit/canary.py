"""The canary that a trainer leaves in a checkpoint's folder: short prompts, and what its weights expect next.

Knows one JSON file. What an engine's answers to it mean is the publisher's to judge.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from art_core.errors import CorruptCheckpoint

CANARY = "canary.json"
# A logprob may be infinite; written as null it could not be read back.
_JSON = ConfigDict(frozen=True, defer_build=True, ser_json_inf_nan="constants")


class CanaryPrompt(BaseModel):
    """A short prompt and what the checkpoint expects next.

    `token_ids` is the prompt. `expected` maps the most likely next token ids to their logprobs under this checkpoint
    (at temperature 1), `previous` the same ids to their logprobs under the checkpoint it was trained from, `base` to
    those under the base model without an adapter.
    """

    model_config = _JSON

    token_ids: list[int]
    expected: dict[int, float]
    previous: dict[int, float] | None = None
    base: dict[int, float] | None = None


class Canary(BaseModel):
    """The prompts by which an engine shows that it serves this checkpoint and no other.

    `exact_to` is how exactly the trainer computes their logprobs, in nats: what rounding to its number format leaves
    undecided. A checkpoint that differs from another by less can't be told from it.
    """

    model_config = _JSON

    prompts: list[CanaryPrompt]
    exact_to: float = 0.0


def read_canary(folder: Path) -> Canary | None:
    """The checkpoint's canary, or None when its trainer left none (as for step 0)."""
    try:
        return Canary.model_validate_json((folder / CANARY).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise CorruptCheckpoint(f"{folder / CANARY} cannot be read: {error}") from error
