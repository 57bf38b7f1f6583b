"""The Unsloth policy: a base that Unsloth loaded with one PEFT LoRA adapter, on a CPU or one CUDA device.

Offers art-training-kit's Policy. Knows how a packed row goes through Unsloth's decoder and which adapter is in force;
how a base is loaded is `base_model`'s, and no loss, optimizer or job is known.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from art_engine_kit.adapter_config import AdapterConfig
from art_engine_kit.adapter_files import PEFT_PREFIX, Adapter, check_adapter, weights_file, write_adapter
from art_training_kit.device_choice import activation_bytes, too_large_to_keep

from ..declared import Checkpointing, Settings
from .base_model import Base

if TYPE_CHECKING:
    from art_training_kit.packing import PackedRow

TRAINED: Final = "default"
REFERENCE: Final = "reference"
# What Unsloth's get_peft_model and PEFT's LoraConfig are not told: it is theirs to say, or is said otherwise.
_THEIRS: Final = ("base_model_name_or_path", "peft_type", "task_type", "inference_mode")


def tree_mask(row: PackedRow, device: torch.device) -> Tensor:
    """[S, S]: True where token q (row) sees token k (column), its ancestor or itself."""
    at = torch.arange(len(row), device=device)
    end = torch.from_numpy(row.tree_end).to(device)
    return (at[None, :] <= at[:, None]) & (at[:, None] < end[None, :])


class UnslothPolicy:
    """See `art_training_kit.policy.Policy`. `load` makes the base, and again for an adapter of fewer modules."""

    engine = "unsloth"
    sharded = False

    def __init__(
        self,
        load: Callable[[], Base],
        tokenizer: Any,
        base_model: str,
        dtype: torch.dtype,
        settings: Settings,
    ) -> None:
        self._load = load
        self._base = load()
        self._dtype = dtype
        self._peft: Any = None
        self._config: AdapterConfig | None = None
        # Which modules Unsloth's kernels may have been put into.
        self._modules: set[str] = set()
        self._reference_loaded: tuple[Path, bytes] | None = None
        self._settings = settings
        self._checkpointing_now: Checkpointing | None = None
        self._bytes_per_token = activation_bytes(self._base.config, dtype)
        self.tokenizer = tokenizer
        self.base_model = base_model
        self.device: torch.device = self._base.model.device

    @property
    def max_length(self) -> int:
        """Positions the base was made for."""
        return int(self._base.config.max_position_embeddings)

    @property
    def vocabulary_size(self) -> int:
        """Rows of the output matrix."""
        return int(self.output_weight.shape[0])

    @property
    def output_weight(self) -> Tensor:
        """[vocabulary, hidden size], frozen; 16 bit also where the rest of the base has 4."""
        return self._base.output_weight

    @property
    def projection_shapes(self) -> Mapping[str, tuple[int, int]]:
        """(out features, in features) of the base's linear layers, by their paths."""
        return self._base.projections

    @property
    def num_layers(self) -> int:
        """Of the base."""
        return int(self._base.config.num_hidden_layers)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return self._dtype

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """By PEFT's names, sorted."""
        self._require_adapter()
        return dict(sorted(self._parameters_of(TRAINED).items()))

    def hidden_states(self, row: PackedRow) -> Tensor:
        """One forward of the decoder, without the output matrix, in training mode as Unsloth is used.

        Attention goes through torch's own, with a mask of a number for each pair of tokens: Unsloth's kernels for
        packed rows take no tree.
        """
        self._require_adapter()
        self._set_checkpointing(self._mode_for(len(row)) if torch.is_grad_enabled() else False)
        ids, positions = (
            torch.from_numpy(values)[None].to(self.device) for values in (row.token_ids, row.position_ids)
        )
        # As Unsloth's trainers have it: adapters are fp32, and the products are in the base's dtype.
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
            hidden: Tensor = self._base.decoder(
                input_ids=ids, position_ids=positions, attention_mask=self._mask(row), use_cache=False
            ).last_hidden_state
        return hidden[0].to(self._dtype)

    def attention_mask_bytes(self, tokens: int, /) -> int:
        """A byte for each pair on a CPU, a number of the base's dtype on a GPU."""
        return tokens * tokens * (self._dtype.itemsize if self.device.type == "cuda" else 1)

    @contextmanager
    def first_layers(self, count: int) -> Iterator[None]:
        """Within the block hidden states are those after the base's first layers and its last norm."""
        decoder = self._base.decoder
        layers = decoder.layers
        decoder.layers = layers[:count]
        try:
            yield
        finally:
            decoder.layers = layers

    def load_adapter(self, folder: Path) -> None:
        """Reuse the modules that are there when the adapter's shape is theirs, else make new ones."""
        adapter = check_adapter(folder, self._base.projections)
        if self._config is None or self._config.shape != adapter.config.shape:
            self._make(adapter.config, set(adapter.pairs))
        self._config = adapter.config
        self._put(adapter, TRAINED)
        self._peft.set_adapter(TRAINED)

    def drop_adapter(self) -> None:
        """Have the base alone again."""
        if self._peft is not None:
            self._peft.unload()
            self._peft = self._config = self._reference_loaded = None

    def save_adapter(self, folder: Path) -> None:
        """PEFT's two files, fp32."""
        config = self._require_adapter()
        pairs = {}
        for module in sorted(self._modules):
            layer = self._base.model.get_submodule(module)
            a, b = (side[TRAINED].weight.detach().cpu().numpy() for side in (layer.lora_A, layer.lora_B))
            pairs[module] = (a, b)
        write_adapter(folder, config, pairs)

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
            self._install_reference(check_adapter(folder, self._base.projections))
            self._reference_loaded = state
        self._peft.set_adapter(REFERENCE)
        try:
            yield
        finally:
            self._peft.set_adapter(TRAINED)

    def _make(self, config: AdapterConfig, modules: set[str]) -> None:
        """An adapter of this shape on the base alone, with Unsloth's kernels for the modules that it is for."""
        self.drop_adapter()
        if not modules >= self._modules:
            # Unsloth's kernels stay in the modules that they were put into, and take each of those for adapted.
            del self._base
            gc.collect()
            self._base = self._load()
        config_of = {name: value for name, value in config.to_peft().items() if name not in _THEIRS}
        with redirect_stdout(sys.stderr):
            self._peft = self._base.unsloth.get_peft_model(
                self._base.model, **config_of, use_gradient_checkpointing=self._settings.prepared_checkpointing
            )
        self._modules = modules
        self._checkpointing_now = None

    def _install_reference(self, adapter: Adapter) -> None:
        """Unsloth's kernels need the adapter in force in every module that was trained; where it has none it is 0."""
        from peft import LoraConfig

        modules = sorted(self._modules | adapter.pairs.keys())
        ranks = {module: adapter.config.rank(module) for module in adapter.pairs}
        alphas = {module: adapter.config.scaling(module) * ranks[module] for module in ranks}
        config = LoraConfig(
            r=1, lora_alpha=1, target_modules=modules, rank_pattern=ranks, alpha_pattern=alphas, task_type="CAUSAL_LM"
        )
        if REFERENCE in self._peft.peft_config:
            self._peft.delete_adapter(REFERENCE)
        self._peft.add_adapter(REFERENCE, config)
        self._put(adapter, REFERENCE)

    def _put(self, adapter: Adapter, name: str) -> None:
        from peft import set_peft_model_state_dict

        state = {
            f"{PEFT_PREFIX}{module}.lora_{side}.weight": torch.from_numpy(tensor.float32())
            for module, pair in adapter.pairs.items()
            for side, tensor in (("A", pair.a), ("B", pair.b))
        }
        set_peft_model_state_dict(self._peft, state, adapter_name=name)
        for parameter in self._parameters_of(name).values():
            parameter.data = parameter.data.to(self.device, torch.float32)
            parameter.requires_grad_(name == TRAINED)

    def _parameters_of(self, adapter: str) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._peft.named_parameters() if "lora_" in name and f".{adapter}." in name}

    def _require_adapter(self) -> AdapterConfig:
        if self._config is None:
            raise RuntimeError("load_adapter has to come first: a policy trains the adapter of a checkpoint")
        return self._config

    def _mask(self, row: PackedRow) -> Tensor:
        seen = tree_mask(row, self.device)[None, None]
        if self.device.type != "cuda":
            return seen
        # Unsloth's own forward adds what it is given.
        return torch.zeros_like(seen, dtype=self._dtype).masked_fill_(~seen, torch.finfo(self._dtype).min)

    def _mode_for(self, tokens: int) -> Checkpointing:
        if self._settings.use_gradient_checkpointing is not None:
            return self._settings.use_gradient_checkpointing
        return "unsloth" if too_large_to_keep(tokens * self._bytes_per_token, self.device) else False

    def _set_checkpointing(self, mode: Checkpointing) -> None:
        if mode == self._checkpointing_now:
            return
        self._base.unsloth.for_training(self._peft, use_gradient_checkpointing=mode)
        self._checkpointing_now = mode
