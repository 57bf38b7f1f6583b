"""What the worker trains: a base model with one LoRA adapter. Knows no loss, no optimizer and no job."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from art_engine_kit.adapter_files import check_adapter
from art_training_kit.device_choice import compute_device, compute_dtype
from art_training_kit.policy import PolicyRequest

if TYPE_CHECKING:
    from art_training_kit.packing import PackedRow

TRAINED, REFERENCE = "default", "reference"


def load_policy(request: PolicyRequest) -> "ExamplePolicy":
    """The factory that the worker is given: reads the base model's weights and tokenizer from a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = compute_device(request.device)
    dtype = compute_dtype(device, request.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(request.base_model, dtype=dtype)  # yours
    return ExamplePolicy(model.to(device), AutoTokenizer.from_pretrained(request.base_model), request)


class ExamplePolicy:
    """See `art_training_kit.policy.Policy`."""

    engine = "example"
    sharded = False

    def __init__(self, model: Any, tokenizer: Any, request: PolicyRequest) -> None:
        self._base = model.requires_grad_(False).eval()
        self._shapes = {
            name: (module.out_features, module.in_features)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }
        self._peft: Any = None
        self.tokenizer = tokenizer
        self.base_model = str(request.base_model)
        self.device: torch.device = model.device
        self.max_length = int(model.config.max_position_embeddings)
        self.output_weight: Tensor = model.get_output_embeddings().weight
        self.vocabulary_size = int(self.output_weight.shape[0])
        if request.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return dict(sorted((name, p) for name, p in self._peft.named_parameters() if p.requires_grad))

    def hidden_states(self, row: "PackedRow") -> Tensor:
        """Each token sees its ancestors and itself: what came before it and whose branch it is in."""
        at = torch.arange(len(row), device=self.device)
        end = torch.from_numpy(row.tree_end).to(self.device)
        sees = (at[None, :] <= at[:, None]) & (at[:, None] < end[None, :])
        hidden: Tensor = self._base.model(  # yours
            input_ids=torch.from_numpy(row.token_ids)[None].to(self.device),
            position_ids=torch.from_numpy(row.position_ids)[None].to(self.device),
            attention_mask=sees[None, None],
            use_cache=False,
        ).last_hidden_state
        return hidden[0]

    def attention_mask_bytes(self, tokens: int, /) -> int:
        """A byte for each pair, as `hidden_states` makes it."""
        return tokens * tokens

    def load_adapter(self, folder: Path) -> None:
        from peft import PeftModel

        check_adapter(folder, self._shapes)
        if self._peft is not None:
            self._peft.unload()
        self._peft = PeftModel.from_pretrained(self._base, folder, is_trainable=True)  # yours

    def save_adapter(self, folder: Path) -> None:
        self._peft.save_pretrained(folder, selected_adapters=[TRAINED])  # yours

    @contextmanager
    def reference(self, folder: Path | None) -> Iterator[None]:
        """Within the block hidden states are those of another adapter, or of the base alone."""
        if folder is None:
            with self._peft.disable_adapter():
                yield
            return
        check_adapter(folder, self._shapes)
        self._peft.load_adapter(folder, REFERENCE)
        self._peft.set_adapter(REFERENCE)
        try:
            yield
        finally:
            self._peft.set_adapter(TRAINED)
            self._peft.delete_adapter(REFERENCE)
