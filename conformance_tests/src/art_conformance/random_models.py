"""Random models of any of transformers' kinds and PEFT adapters for them, for what the tiny Llama model can't show.

Needs torch, transformers and PEFT (the extra `oracle`); starts nothing.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from .tiny_model import write_base_model

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def write_random_model(folder: Path, kind: str, **settings: Any) -> Path:
    """A random model of one of transformers' kinds, such as "qwen2", with the tokenizer of the tiny model beside it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny = write_base_model(folder.parent / f"{folder.name}-tokenizer")
    shape = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**shape, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
    model.save_pretrained(folder)
    for name in _TOKENIZER:
        shutil.copyfile(tiny / name, folder / name)
    return folder


def adapter_by_peft(base: Path, folder: Path, settings: dict[str, Any]) -> Path:
    """An adapter that PEFT itself wrote, with these settings of its LoraConfig; not the identity."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(folder))
    return folder


# Adapters that an engine's own builders may have no setting for, as settings of PEFT's LoraConfig.
UNUSUAL_ADAPTERS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "patterns": {
        "target_modules": "all-linear", "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 6},
        "alpha_pattern": {"k_proj": 40, "down_proj": 2},
    },
    "few": {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1]},
}  # fmt: skip
