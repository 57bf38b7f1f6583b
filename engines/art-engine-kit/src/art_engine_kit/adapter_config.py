"""What a PEFT LoRA config says of the adapter beside it: which modules, which rank and scale each, and what is refused.

The one place that knows PEFT's settings (those of PEFT 0.21). Reads one JSON file; knows no tensor and imports no PEFT.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from art_core.errors import AdapterMismatch

from .base_shapes import NOT_LINEAR, named_modules
from .checkpoint_folder import ADAPTER_CONFIG

# PEFT's settings that say nothing about what a saved adapter computes: how it was initialised and trained, what for,
# and what only another setting turns on.
HARMLESS: Final = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
# Settings that are taken only where they are off, and what to do about them.
_MERGE: Final = (
    "Merge it into the base model with PEFT (merge_and_unload, save_pretrained) and give that folder as base_model."
)
_OFF: Final = "If the weights are those of a plain LoRA adapter all the same, turn it off in the config."
REFUSED: Final[Mapping[str, str]] = {
    "alora_invocation_tokens": f"An activated LoRA works from certain tokens on, which no engine here does. {_OFF}",
    "arrow_config": f"Arrow chooses among adapters token by token, which no engine here does. {_OFF}",
    "bias": f"Trained biases are not served beside other adapters. {_MERGE}",
    "fan_in_fan_out": "It is for layers that keep their weights transposed, as GPT-2's, which no engine here serves."
    " PEFT itself ignores it for other layers: set it to false if the base model has none of them.",
    "kasa_config": f"KaSA changes the base model's weights. {_MERGE}",
    "layer_replication": f"It makes more layers than the base model has. {_MERGE}",
    "lora_bias": f"A bias of lora_B is not served. {_MERGE}",
    "megatron_config": f"It is for Megatron's own layers. {_OFF}",
    "modules_to_save": f"Whole modules beside the LoRA weights are not served. {_MERGE}",
    "monteclora_config": f"MonteCLoRA samples its weights, which no engine here does. {_OFF}",
    "target_parameters": f"LoRA on bare parameters, as of a mixture's experts, is not served. {_MERGE}",
    "trainable_token_indices": f"Trained rows of the table of embeddings are not served. {_MERGE}",
    "use_bdlora": f"Block-diagonal LoRA is not served. {_MERGE}",
    "use_dora": f"DoRA's magnitudes are not served. {_MERGE}",
    "use_qalora": f"QALoRA pools what goes into its layers, which no engine here does. {_MERGE}",
    "velora_config": f"VeLoRA keeps weights of its own beside the adapter's. {_OFF}",
}
# With these the saved weights belong to the base model as it is. PiSSA, OLoRA, CorDA and LoftQ change the base when
# PEFT loads them, so that the same weights on the plain base would be another policy.
PLAIN_INITS: Final = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list | set | frozenset | tuple) else value


def _one_or_several(value: object) -> object:
    return None if value in (None, [], "") else _as_tuple(value if isinstance(value, list | tuple) else [value])


def _empty(value: object) -> object:
    return {} if value is None else value


Number = TypeVar("Number", int, float)
_Names = str | tuple[str, ...]
_Rank = Annotated[int, Field(ge=1)]


class AdapterConfig(BaseModel):
    """What decides what a saved LoRA adapter computes: per module, `lora_B @ lora_A` times a scale. PEFT's names.

    `lora_dropout` is how it was trained so far. It is read to be said, and taken as 0: what is trained must be what is
    served.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    peft_type: Literal["LORA"] = "LORA"
    base_model_name_or_path: str | None = None
    r: _Rank
    lora_alpha: float
    use_rslora: bool = False
    target_modules: Annotated[_Names, Field(min_length=1), BeforeValidator(_as_tuple)]
    exclude_modules: Annotated[_Names | None, BeforeValidator(_as_tuple)] = None
    layers_to_transform: Annotated[tuple[int, ...] | None, BeforeValidator(_one_or_several)] = None
    layers_pattern: Annotated[tuple[str, ...] | None, BeforeValidator(_one_or_several)] = None
    rank_pattern: Annotated[dict[str, _Rank], BeforeValidator(_empty)] = {}
    alpha_pattern: Annotated[dict[str, float], BeforeValidator(_empty)] = {}
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _as_peft_takes_it(self) -> Self:
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform needs target_modules to be a list of names, not a pattern")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern says nothing without layers_to_transform")
        patterns = [*self.rank_pattern, *self.alpha_pattern, *(self.layers_pattern or ())]
        patterns += [one for one in (self.target_modules, self.exclude_modules) if isinstance(one, str)]
        for pattern in patterns:
            try:
                re.compile(f"({pattern})")
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return self

    @property
    def shape(self) -> Self:
        """Equal for adapters that the same modules hold at the same scales: all but what they are for and come from."""
        return self.model_copy(update={"base_model_name_or_path": None, "lora_dropout": 0.0})

    def rank(self, module: str) -> int:
        """The rank of one module, by its path in the base model."""
        return _of_pattern(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """What `lora_B @ lora_A` of one module is multiplied by."""
        alpha, rank = _of_pattern(self.alpha_pattern, module, self.lora_alpha), self.rank(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def modules(self, there: Collection[str]) -> list[str]:
        """Those of the base model's modules `there` that the adapter is for, as PEFT chooses them."""
        chosen = named_modules(there, self.target_modules)
        if self.layers_to_transform is not None and not isinstance(self.target_modules, str):
            whole = set(self.target_modules)  # a whole path counts whatever its layer
            chosen = [module for module in chosen if module in whole or self._layer(module) in self.layers_to_transform]
        left_out = set(named_modules(chosen, self.exclude_modules)) if self.exclude_modules else set()
        return [module for module in chosen if module not in left_out]

    def to_peft(self) -> dict[str, Any]:
        """The config as PEFT writes it, with everything else as for a plain adapter."""
        return {
            **self.model_dump(mode="json"),
            "task_type": "CAUSAL_LM",
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "modules_to_save": None,
        }

    def write(self, folder: Path) -> None:
        """Write it as the config of an adapter folder."""
        (folder / ADAPTER_CONFIG).write_text(json.dumps(self.to_peft(), indent=1), encoding="utf-8")

    def _layer(self, module: str) -> int | None:
        patterns = self.layers_pattern or (r"[^.]*",)
        before = r".*?\." if self.layers_pattern is None else r"(?:^|.*?\.)"
        found = (re.match(rf"{before}{pattern}\.(?P<layer>\d+)\.", module) for pattern in patterns)
        return next((int(match["layer"]) for match in found if match), None)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read the config of an adapter folder.

    Raises AdapterMismatch, naming the file, the setting and what to do, when it can't be read, is not LoRA's, or says
    something that is not served and trained as PEFT computes it. Its cause is a FileNotFoundError where nothing is
    there.
    """
    file = folder / ADAPTER_CONFIG
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        if not folder.is_dir():
            raise AdapterMismatch(f"there is no adapter folder {folder}.") from error
        raise AdapterMismatch(f"{folder} has no {ADAPTER_CONFIG}, so it is no PEFT adapter.") from error
    except (OSError, ValueError) as error:
        raise AdapterMismatch(f"{file} cannot be read as JSON: {error}. Save the adapter again.") from error
    if not isinstance(config, dict):
        raise AdapterMismatch(f"{file} holds no JSON object, so it is no PEFT config. Save the adapter again.")
    if config.get("peft_type") != "LORA":
        raise AdapterMismatch(
            f"{file}: peft_type is {config.get('peft_type')!r}; only LoRA adapters ('LORA') are served and trained."
        )
    if not config.get("target_modules"):
        raise AdapterMismatch(
            f"{file} names no target_modules. Put the names of the modules there that the adapter has weights for."
        )
    _refuse_what_is_not_plain(file, config)
    try:
        return AdapterConfig.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][:1])
        given = f" It is {config.get(name)!r}." if name else ""
        words = first["msg"].removeprefix("Value error, ").replace("Input should", "must")
        raise AdapterMismatch(f"{file}: {name + ': ' if name else ''}{words}.{given} Mend the config.") from error


def base_model_of_adapter(folder: Path) -> str:
    """The base model's name or folder that a PEFT adapter says it is for. Raises AdapterMismatch when it says none."""
    name = read_adapter_config(folder).base_model_name_or_path
    if not name:
        raise AdapterMismatch(
            f"{folder / ADAPTER_CONFIG} does not say its base model (base_model_name_or_path). Put the base model's"
            " name or folder there."
        )
    return name


def _refuse_what_is_not_plain(file: Path, config: Mapping[str, Any]) -> None:
    for name, value in config.items():
        if name in AdapterConfig.model_fields or name in HARMLESS or _is_off(value):
            continue
        if name in REFUSED:
            raise AdapterMismatch(f"{file} says {name}={value!r}, which is refused. {REFUSED[name]}")
        if name != "init_lora_weights":
            raise AdapterMismatch(
                f"{file} says {name}={value!r}, a setting that is not known here, so that what it changes is not known"
                f" either. {_OFF}"
            )
        if value is not True and str(value).lower() not in PLAIN_INITS:
            raise AdapterMismatch(
                f"{file} says init_lora_weights={value!r}: PEFT changes the base model's weights when it loads such an"
                " adapter, which is refused. Save it anew with PEFT's save_pretrained(folder,"
                " path_initial_model_for_weight_conversion=...), or set init_lora_weights to true if base_model holds"
                " the changed weights."
            )
    named = config["target_modules"]
    on_ends = [] if isinstance(named, str) else [one for one in named if str(one).rpartition(".")[2] in NOT_LINEAR]
    if on_ends:
        raise AdapterMismatch(
            f"{file}: target_modules names {', '.join(map(repr, on_ends))}. The table of embeddings and the output"
            f" matrix are served and trained as the base model has them. {_MERGE}"
        )


def _is_off(value: object) -> bool:
    return value in (None, False, "none", "", [], {})


def _of_pattern(patterns: Mapping[str, Number], module: str, otherwise: Number) -> Number:
    """The value of the first of `patterns` that fits the end of a module's path, as PEFT finds it."""
    fitting = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(fitting, otherwise)
