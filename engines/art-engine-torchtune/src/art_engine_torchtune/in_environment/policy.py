"""The torchtune policy: torchtune's decoder with LoRA on a CPU or one CUDA device.

Offers art-training-kit's Policy. Knows how a packed row goes through the decoder and which adapter is in force; how
base and adapters are made is `base_model`'s and `adapters`', and no loss, optimizer or job is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from art_engine_kit.adapter_files import check_adapter, weights_file, write_adapter
from art_training_kit.device_choice import activation_bytes, too_large_to_keep

from .adapters import Lora, lora_of
from .base_model import PROJECTIONS, Base

if TYPE_CHECKING:
    from art_training_kit.packing import PackedRow


def tree_mask(row: PackedRow, device: torch.device) -> Tensor:
    """[S, S]: True where token q (row) sees token k (column), its ancestor or itself."""
    at = torch.arange(len(row), device=device)
    end = torch.from_numpy(row.tree_end).to(device)
    return (at[None, :] <= at[:, None]) & (at[:, None] < end[None, :])


class TorchtunePolicy:
    """See `art_training_kit.policy.Policy`."""

    engine = "torchtune"
    sharded = False

    def __init__(self, base: Base, tokenizer: Any, base_model: str, gradient_checkpointing: bool | None) -> None:
        self._base = base
        self._dtype = base.output_weight.dtype
        self._layers = {True: _recomputing(base.decoder.layers), False: base.decoder.layers}
        self._places = _places(base.decoder.layers)
        self.projection_shapes = {name: (p.out_features, p.in_features) for name, p in base.projections.items()}
        self._trained: Lora | None = None
        self._reference: Lora | None = None
        self._reference_loaded: tuple[Path, bytes] | None = None
        self._checkpointing = gradient_checkpointing
        self._bytes_per_token = activation_bytes(base.config, self._dtype)
        self.tokenizer = tokenizer
        self.base_model = base_model
        self.device: torch.device = base.output_weight.device

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
        """[vocabulary, hidden size], frozen."""
        return self._base.output_weight

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """By PEFT's names, sorted."""
        return dict(sorted(self._adapter().parameters()))

    def hidden_states(self, row: PackedRow) -> Tensor:
        """One forward of the decoder, whose output layer was taken out. Its mask has a byte for each pair of tokens."""
        decoder = self._base.decoder
        if len(row) > decoder.max_seq_len:
            raise ValueError(
                f"a packed row has {len(row)} tokens, and torchtune was loaded for {decoder.max_seq_len}: lower"
                " packed_sequence_length, or raise init_args' max_seq_length."
            )
        decoder.layers = self._layers[torch.is_grad_enabled() and self._must_checkpoint(len(row))]
        ids, positions = (
            torch.from_numpy(values)[None].to(self.device) for values in (row.token_ids, row.position_ids)
        )
        mask = tree_mask(row, self.device)[None]
        # Adapters are fp32, and torchtune's products take one dtype.
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
            hidden: Tensor = decoder(ids, mask=mask, input_pos=positions)[0]
        return hidden.to(self._dtype)

    def attention_mask_bytes(self, tokens: int, /) -> int:
        """A byte for each pair."""
        return tokens * tokens

    @property
    def num_layers(self) -> int:
        """Of the base."""
        return int(self._base.config.num_hidden_layers)

    @contextmanager
    def first_layers(self, count: int) -> Iterator[None]:
        """Within the block hidden states are those after the base's first layers and its last norm."""
        all_layers = self._layers
        self._layers = {recomputing: layers[:count] for recomputing, layers in all_layers.items()}
        try:
            yield
        finally:
            self._layers = all_layers

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Within the block the same weights are computed with in fp32. To be used within `first_layers`, if at all."""
        decoder, dtype = self._base.decoder, self._dtype
        parts = (decoder.tok_embeddings, *self._layers[False], decoder.norm)
        weights = [weight for part in parts for weight in part.parameters() if weight.dtype == dtype]
        for weight in weights:
            weight.data = weight.data.float()
        self._dtype = torch.float32
        try:
            yield
        finally:
            for weight in weights:
                weight.data = weight.data.to(dtype)
            self._dtype = dtype

    def load_adapter(self, folder: Path) -> None:
        """Put the adapter's layers in the place of the projections that they are for."""
        self._trained = self._read(folder, trained=True)
        self._use(self._trained)

    def drop_adapter(self) -> None:
        """Have the base alone again."""
        self._trained = None
        self._use(None)

    def save_adapter(self, folder: Path) -> None:
        """PEFT's two files, fp32."""
        lora = self._adapter()
        pairs = {name: (a.detach().cpu().numpy(), b.detach().cpu().numpy()) for name, (a, b) in lora.pairs.items()}
        write_adapter(folder, lora.config, pairs)

    @contextmanager
    def reference(self, folder: Path | None) -> Iterator[None]:
        """Switches adapters for the block; the trained one is back afterwards."""
        trained = self._adapter()
        if folder is not None:
            state = (folder, weights_file(folder).read_bytes())
            if self._reference_loaded != state:
                self._reference = self._read(folder, trained=False)
                self._reference_loaded = state
        self._use(None if folder is None else self._reference)
        try:
            yield
        finally:
            self._use(trained)

    def _read(self, folder: Path, *, trained: bool) -> Lora:
        return lora_of(check_adapter(folder, self.projection_shapes), self._base, self.device, trained=trained)

    def _use(self, lora: Lora | None) -> None:
        layers = lora.layers if lora is not None else {}
        for name, (parent, attribute) in self._places.items():
            setattr(parent, attribute, layers.get(name, self._base.projections[name]))

    def _adapter(self) -> Lora:
        if self._trained is None:
            raise RuntimeError("load_adapter has to come first: a policy trains the adapter of a checkpoint")
        return self._trained

    def _must_checkpoint(self, tokens: int) -> bool:
        if self._checkpointing is not None:
            return self._checkpointing
        return too_large_to_keep(tokens * self._bytes_per_token, self.device)


def _recomputing(layers: nn.ModuleList) -> nn.ModuleList:
    """The same layers, whose activations are computed again in the backward pass: what torchtune's recipes wrap."""
    return nn.ModuleList(checkpoint_wrapper(layer) for layer in layers)


def _places(layers: nn.ModuleList) -> dict[str, tuple[nn.Module, str]]:
    """The module that holds each projection, and as what, by the projection's path in transformers' model."""
    places = {}
    for index, layer in enumerate(layers):
        for name, own in PROJECTIONS.items():
            parent, _, attribute = own.rpartition(".")
            places[f"model.layers.{index}.{name}"] = (layer.get_submodule(parent), attribute)
    return places
