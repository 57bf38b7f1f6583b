"""What transformers and PEFT make of a tree, run as a program in Unsloth's environment without Unsloth.

In the process that imported Unsloth transformers is patched, and would be compared with itself. Reads a JSON request on
stdin's first line and computes logits and an adapter's gradients in fp32 of the weights that Unsloth loads, and in the
dtype that is trained in; imports nothing of ours. Ends when stdin does.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

import torch
from torch import Tensor


def main() -> None:
    """Answer one request: folders and settings in, a safetensors file out."""
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()

    from safetensors.torch import save_file
    from transformers.utils import logging as transformers_logging

    # It warns of the layers that are left out, which is meant, and shows a bar where none is seen.
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    found = {f"exact.{name}": value for name, value in computed(request, exact=True).items()}
    if request["dtype"] != "float32":
        found |= {f"stock.{name}": value for name, value in computed(request, exact=False).items()}
    save_file({name: value.cpu().contiguous() for name, value in found.items()}, request["out"])


def _end_with_stdin() -> None:
    # Not through sys.stdin, whose lock would be held when this process ends by itself.
    while os.read(0, 1):
        pass
    os._exit(1)


def computed(request: dict[str, Any], *, exact: bool) -> dict[str, Tensor]:
    """Logits [S, vocabulary] and the adapter's gradients by PEFT's names, of the base's first layers."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device, dtype = torch.device(request["device"]), getattr(torch, request["dtype"])
    bits: dict[str, Any] = {}
    if request["load_in_4bit"]:
        bits["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        bits["device_map"] = {"": str(device)}
    model: Any = AutoModelForCausalLM.from_pretrained(
        request["base_model"],
        dtype=dtype,
        num_hidden_layers=request["layers"],
        attn_implementation="sdpa",
        **bits,
    )
    if exact and bits:
        model = model.dequantize()
    if exact:
        model = model.float()
    model = model.to(device).eval()
    model = PeftModel.from_pretrained(model, request["adapter"], is_trainable=True)
    ids, positions = (torch.tensor(request[name], device=device)[None] for name in ("token_ids", "position_ids"))
    mask = torch.tensor(request["mask"], device=device)[None, None]
    logits = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits[0].float()
    loss(logits, ids[0]).backward()  # type: ignore[no-untyped-call]
    gradients = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **{f"gradient.{name}": value for name, value in gradients.items()}}


def loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Something that depends on every logit: minus the sum of each token's own logprob."""
    return -torch.log_softmax(logits, -1).gather(1, ids[:, None]).sum()


if __name__ == "__main__":
    main()
