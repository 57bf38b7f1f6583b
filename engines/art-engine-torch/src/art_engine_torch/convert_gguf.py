"""Turns one GGUF file into a plain transformers folder (config, safetensors, tokenizer with its chat template).

Run as a process of its own, `python -m art_engine_torch.convert_gguf FILE.gguf FOLDER`, so that whoever asks for the
weights never loads torch. It knows nothing of caches, downloads or model names.
"""

from __future__ import annotations

import sys
from pathlib import Path


def convert(gguf_file: Path, folder: Path) -> None:
    """Writes the model of `gguf_file`, in bfloat16, and its tokenizer into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(gguf_file.parent)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file.name)
    if not tokenizer.chat_template:
        raise ValueError(f"{gguf_file} carries no chat template, so chat requests could not be answered from it")
    dequantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file.name, dtype=torch.float32)
    config = dequantized.config
    if hasattr(config, "quantization_config"):
        # The weights are plain numbers from here on; with this left in, every later load would look for a quantizer.
        del config.quantization_config
    config.dtype = torch.bfloat16
    plain = type(dequantized)(config)
    plain.load_state_dict(dequantized.state_dict())
    plain.tie_weights()
    plain.generation_config = dequantized.generation_config
    plain.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
