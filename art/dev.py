"""Settings for those who know the engine underneath: what `TrainableModel(_internal_config=...)` takes.

The one list of them, read once, when a model is made: an unknown key is refused with the nearest name, and so are a
value that cannot be and a combination of GPUs that cannot work. A backend gets what was read here, and adds what it
cannot do. What the settings mean is the engines' affair.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import ConfigDict, Field, GetPydanticSchema, PlainValidator, TypeAdapter, ValidationError, with_config
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from art_core.errors import UnknownArgument

__all__ = ["InternalModelConfig", "PeftArgs", "TrainerArgs"]

_OURS = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_ENGINES_TOO = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
_Whole = Annotated[int, Field(ge=1)]


def _names(given: object) -> object:
    """One text or several, None for the default."""
    if given is None or (isinstance(given, str) and given):
        return given
    several = isinstance(given, list | tuple | set | frozenset)
    if several and given and all(isinstance(name, str) and name for name in cast("list[object]", given)):
        return list(cast("list[str]", given))
    raise PydanticCustomError("names_type", "must be text or a list of names")


@with_config(_OURS)
class PeftArgs(TypedDict, total=False):
    """What LoRA adapter to make; the names are PEFT's.

    Defaults: `r` 8, `lora_alpha` 16, `random_state` 3407 (it seeds A), and for `target_modules`, which is a list of
    names, a pattern or "all-linear", the seven projections of a decoder layer.
    """

    r: _Whole
    lora_alpha: Annotated[float, Field(gt=0)]
    target_modules: Annotated[str | list[str] | None, PlainValidator(_names)]
    use_rslora: bool
    random_state: int
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    bias: Literal["none", "all", "lora_only"]


@with_config(_OURS)
class TrainerArgs(TypedDict, total=False):
    """AdamW's settings, and the longest sequence in tokens.

    Defaults: betas 0.9 and 0.99, epsilon 1e-8, weight decay 0.1, `max_grad_norm` 0.1, `max_seq_length` 32768.
    """

    adam_beta1: Annotated[float, Field(ge=0, lt=1)]
    adam_beta2: Annotated[float, Field(ge=0, lt=1)]
    adam_epsilon: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    max_seq_length: _Whole


@with_config(_ENGINES_TOO)
class _EngineArgs(TypedDict, total=False):
    """What every inference engine takes, beside arguments of its own."""

    dtype: str
    max_model_len: _Whole | None
    max_lora_rank: _Whole


@with_config(_ENGINES_TOO)
class _InitArgs(TypedDict, total=False):
    """What every training engine takes, beside arguments of its own."""

    dtype: str
    max_seq_length: _Whole


def _read_as(kind: Any) -> Any:
    """For users any dictionary, of which the names in `kind` are checked."""
    return GetPydanticSchema(lambda _, handler: handler(kind))


@with_config(_OURS)
class InternalModelConfig(TypedDict, total=False):
    """Engine and adapter settings.

    `init_args` go to the training engine's loading of the base model, `engine_args` to the inference engine; both hold
    the engine's own arguments, beside `dtype`, `max_seq_length` (training), `max_model_len` and `max_lora_rank`
    (inference). `peft_args` make the LoRA adapter, `trainer_args` the optimizer. `trainer_gpu_ids` and
    `inference_gpu_ids` are CUDA indices: both together make a dedicated backend. `rollout_weights_mode` says whether
    rollouts run on the adapter ("lora") or on merged weights ("merged", dedicated only). `chat_template` is the text of
    a Jinja template, `chat_template_path` a file that holds one, `chat_template_kwargs` its variables.
    """

    init_args: Annotated[dict[str, Any], _read_as(_InitArgs)]
    engine_args: Annotated[dict[str, Any], _read_as(_EngineArgs)]
    peft_args: PeftArgs
    trainer_args: TrainerArgs
    trainer_gpu_ids: Annotated[list[int], _read_as(Any)]
    inference_gpu_ids: Annotated[list[int], _read_as(Any)]
    rollout_weights_mode: Literal["lora", "merged"]
    chat_template: str
    chat_template_path: str
    chat_template_kwargs: dict[str, Any]


_GPUS = ("trainer_gpu_ids", "inference_gpu_ids")
# Pydantic's words for what a value should be, where there are plainer ones.
_KINDS = {"dict_type": "must be a dictionary", "string_type": "must be text", "int_type": "must be a whole number"}


def read_internal_config(config: Mapping[str, Any]) -> InternalModelConfig:
    """Read `_internal_config`. Raises UnknownArgument, with the nearest name, for a key that nothing reads, TypeError
    for a value of the wrong kind, ValueError for one that cannot work.
    """
    try:
        read = _adapter().validate_python(dict(config) if isinstance(config, Mapping) else config)
    except ValidationError as error:
        # Of several, what nothing knows comes first: another word may be all that is wrong.
        wrong = sorted(error.errors(), key=lambda found: found["type"] != "extra_forbidden")[0]
        raise _in_words(wrong) from error
    if "chat_template" in read and "chat_template_path" in read:
        raise ValueError("give chat_template or chat_template_path, not both: there is one chat template.")
    dedicated = _check_gpus(read)
    if read.get("rollout_weights_mode") == "merged" and not dedicated:
        raise ValueError(
            "rollout_weights_mode='merged' needs dedicated GPUs: set trainer_gpu_ids and inference_gpu_ids,"
            " or leave 'lora'."
        )
    return read


@functools.cache
def _adapter() -> TypeAdapter[InternalModelConfig]:
    return TypeAdapter(InternalModelConfig)


def _in_words(wrong: Any) -> Exception:
    places = [str(part) for part in wrong["loc"] if isinstance(part, str)]
    known = {"peft_args": PeftArgs, "trainer_args": TrainerArgs}
    if wrong["type"] == "extra_forbidden":
        *outer, name = places
        where = "InternalModelConfig" + "".join(f"[{part!r}]" for part in outer)
        kind = known[outer[0]] if outer else InternalModelConfig
        return UnknownArgument(name, where=where, known=kind.__annotations__)
    words = _KINDS.get(wrong["type"]) or re.sub(r"^(Input|Value) should", "must", wrong["msg"])
    sentence = f"_internal_config{''.join(f'[{part!r}]' for part in places)} {words}, not {wrong['input']!r}."
    return TypeError(sentence) if wrong["type"].endswith("_type") else ValueError(sentence)


def _check_gpus(config: InternalModelConfig) -> bool:
    """True for a dedicated configuration, False for a shared one."""
    given = {name: config[name] for name in _GPUS if name in config}  # type: ignore[literal-required]
    if not given:
        return False
    for name, ids in given.items():
        if not isinstance(ids, list | tuple) or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(f"{name} must be a list of GPU indices such as [0], not {ids!r}.")
        if not ids:
            raise ValueError(f"{name} is empty: name at least one GPU, or leave out both lists for shared GPUs.")
        if len(set(ids)) < len(ids):
            raise ValueError(f"{name}={list(ids)} names a GPU twice.")
    if len(given) == 1:
        (one,), (missing,) = given, set(_GPUS) - set(given)
        raise ValueError(
            f"{one} is set and {missing} is not; {missing} is missing: set both for dedicated GPUs, or neither for"
            " shared ones."
        )
    common = sorted(set(cast("list[int]", given[_GPUS[0]])) & set(cast("list[int]", given[_GPUS[1]])))
    if common:
        raise ValueError(
            f"trainer_gpu_ids and inference_gpu_ids share GPU {', '.join(map(str, common))}: dedicated GPUs must be"
            " disjoint. Leave out both lists to share."
        )
    return True
