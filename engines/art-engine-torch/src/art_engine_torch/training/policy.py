"""The embedded training policy: a transformers model with one PEFT LoRA adapter, on a CPU or one CUDA device.

Offers art-training-kit's Policy. Knows how to load the base, run a packed row through it with tree attention, and read
and write adapters; knows no loss, no optimizer and no job.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from art_core.errors import AdapterMismatch, UnknownArgument
from art_engine_kit.adapter_config import AdapterConfig
from art_engine_kit.adapter_files import PEFT_PREFIX, check_adapter, weights_file
from art_engine_kit.checkpoint_folder import ADAPTER_WEIGHTS
from art_engine_kit.system_errors import as_os_error
from art_training_kit.device_choice import activation_bytes, compute_device, compute_dtype, too_large_to_keep
from art_training_kit.policy import PolicyRequest
from art_training_kit.tree_attention import plan_attention, tree_attention

from .kernels import use_single_steps
from .sharding import shard, wants_shards

if TYPE_CHECKING:
    from art_training_kit.packing import PackedRow

_log = logging.getLogger(__name__)

ATTENTION = "art_tree"
TRAINED = "default"
REFERENCE = "reference"
_INIT_ARGS = ("trust_remote_code", "revision", "shard_base")
# Settings that change logits in ways `output_weight` alone does not express.
_UNSUPPORTED = ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling")


def _attend(
    _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _attention_mask: Tensor | None, *,
    scaling: float, tree_plan: Any, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    return tree_attention(query, key, value, tree_plan, scaling).transpose(1, 2), None


def load_policy(request: PolicyRequest) -> TorchPolicy:
    """The factory that the worker is given. Reads the base model's weights and tokenizer from a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
    from transformers.modeling_utils import AttentionInterface
    from transformers.utils import logging as transformers_logging

    init_args = dict(request.init_args or {})
    for name in init_args:
        if name not in _INIT_ARGS:
            raise UnknownArgument(name, where="init_args of the torch training engine", known=_INIT_ARGS)
    AttentionInterface.register(ATTENTION, _attend)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    device = compute_device(request.device)
    dtype = compute_dtype(device, request.dtype)
    wanted = init_args.pop("shard_base", None)
    model: Any = AutoModelForCausalLM.from_pretrained(
        request.base_model, dtype=dtype, attn_implementation=ATTENTION, **init_args
    )
    sharded = wants_shards(wanted, model, device)
    if sharded:
        shard(model, device)
    model.to(device)
    config: PreTrainedConfig = model.config.get_text_config()
    for name in _UNSUPPORTED:
        if getattr(config, name, None) is not None:
            raise AdapterMismatch(
                f"{request.base_model}: its config sets {name}, which the torch training engine does not compute."
            )
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise AdapterMismatch(
            f"{request.base_model} has sliding-window layers, which the torch training engine does not compute."
        )
    tokenizer = AutoTokenizer.from_pretrained(request.base_model, **init_args)
    return TorchPolicy(model, tokenizer, str(request.base_model), request.gradient_checkpointing, sharded=sharded)


class TorchPolicy:
    """See `art_training_kit.policy.Policy`."""

    engine = "torch"

    def __init__(
        self, model: Any, tokenizer: Any, base_model: str, gradient_checkpointing: bool | None, *, sharded: bool = False
    ) -> None:
        self.sharded = sharded
        self._base = model.requires_grad_(False).eval()
        self._config = model.config.get_text_config()
        self._linears = {
            name: (module.out_features, module.in_features)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }
        self._peft: Any = None
        self._configs: dict[str, AdapterConfig] = {}
        self._reference_loaded: tuple[Path, bytes] | None = None
        self._checkpointing = gradient_checkpointing
        self._checkpointing_now = False
        self._bytes_per_token = activation_bytes(self._config, model.dtype)
        self.tokenizer = tokenizer
        self.base_model = base_model
        self.device: torch.device = model.device
        if model.get_output_embeddings().bias is not None:
            raise AdapterMismatch(f"{base_model} has an output bias, which the torch training engine does not compute.")

    @property
    def max_length(self) -> int:
        """Positions the base was made for."""
        return int(self._config.max_position_embeddings)

    @property
    def vocabulary_size(self) -> int:
        """Rows of the output matrix."""
        return int(self.output_weight.shape[0])

    @property
    def output_weight(self) -> Tensor:
        """[vocabulary, hidden size], frozen."""
        return cast(Tensor, self._base.get_output_embeddings().weight)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """By PEFT's names, sorted."""
        self._require_adapter()
        return dict(sorted((name, p) for name, p in self._peft.named_parameters() if p.requires_grad))

    def hidden_states(self, row: PackedRow) -> Tensor:
        """One forward of the decoder, without the output matrix."""
        self._set_checkpointing(torch.is_grad_enabled() and self._must_checkpoint(len(row)))
        plan = plan_attention(row, self.device)
        hidden = self._base.model(
            input_ids=torch.from_numpy(row.token_ids)[None].to(self.device),
            position_ids=torch.from_numpy(row.position_ids)[None].to(self.device),
            use_cache=False,
            tree_plan=plan,
        ).last_hidden_state
        return cast(Tensor, hidden[0])

    def attention_mask_bytes(self, _tokens: int, /) -> int:
        """None: attention is computed in blocks."""
        return 0

    def load_adapter(self, folder: Path) -> None:
        """Reuse the modules that are there when the adapter's shape is theirs, else make new ones."""
        self._install(folder, TRAINED)
        self._peft.set_adapter(TRAINED)

    def save_adapter(self, folder: Path) -> None:
        """PEFT's two files, fp32."""
        # PEFT's own function looks at every module of the base for each module of the adapter.
        tensors = {
            name.replace(f".{TRAINED}.weight", ".weight"): parameter.detach().cpu().contiguous()
            for name, parameter in self.adapter_parameters().items()
        }
        with as_os_error(folder / ADAPTER_WEIGHTS):
            save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        self._configs[TRAINED].write(folder)

    @contextmanager
    def reference(self, folder: Path | None) -> Iterator[None]:
        """Switches adapters for the block; the trained one is back afterwards."""
        self._require_adapter()
        if folder is None:
            with self._peft.disable_adapter():
                yield
            return
        state = (folder, weights_file(folder).read_bytes())
        if self._reference_loaded != state:
            self._install(folder, REFERENCE)
            self._reference_loaded = state
        self._peft.set_adapter(REFERENCE)
        try:
            yield
        finally:
            self._peft.set_adapter(TRAINED)

    def _install(self, folder: Path, name: str) -> None:
        from peft import LoraConfig, PeftModel, set_peft_model_state_dict

        # All of it is held against the base first: PEFT, failing half-way, would leave the model half changed.
        adapter = check_adapter(folder, self._linears)
        config = LoraConfig(**adapter.config.to_peft() | {"inference_mode": False})
        if self._peft is None:
            self._peft = PeftModel(self._base, config, adapter_name=name)
        elif name not in self._peft.peft_config:
            self._peft.add_adapter(name, config)
        elif self._configs[name].shape != adapter.config.shape:
            other = TRAINED if name == REFERENCE else REFERENCE
            if other in self._peft.peft_config:
                self._peft.set_adapter(other)
                self._peft.delete_adapter(name)
                self._peft.add_adapter(name, config)
            else:
                self._base = self._peft.unload()
                self._peft = PeftModel(self._base, config, adapter_name=name)
        self._configs[name] = adapter.config
        state = {
            f"{PEFT_PREFIX}{module}.lora_{side}.weight": torch.from_numpy(tensor.float32())
            for module, pair in adapter.pairs.items()
            for side, tensor in (("A", pair.a), ("B", pair.b))
        }
        set_peft_model_state_dict(self._peft, state, adapter_name=name)
        for parameter_name, parameter in self._peft.named_parameters():
            if f".{name}." in parameter_name and "lora_" in parameter_name:
                parameter.data = parameter.data.to(self.device, torch.float32)
                parameter.requires_grad_(name == TRAINED)
        use_single_steps(self._peft)

    def _require_adapter(self) -> None:
        if self._peft is None:
            raise RuntimeError("load_adapter has to come first: a policy trains the adapter of a checkpoint")

    def _must_checkpoint(self, tokens: int) -> bool:
        if self._checkpointing is not None:
            return self._checkpointing
        return too_large_to_keep(tokens * self._bytes_per_token, self.device)

    def _set_checkpointing(self, on: bool) -> None:
        if on == self._checkpointing_now:
            return
        self._checkpointing_now = on
        if on:
            _renamed(self._base, "enable")({"use_reentrant": False})
            self._base.train()
        else:
            _renamed(self._base, "disable")()
            self._base.eval()


def _renamed(model: Any, verb: str) -> Any:
    """transformers 5 renamed this on the way; both names take the same arguments."""
    return getattr(model, f"activation_checkpointing_{verb}", None) or getattr(model, f"gradient_checkpointing_{verb}")
