"""One forward and backward pass of LoRA training by plain transformers and PEFT, or by TRL's GRPOTrainer.

Runs in an environment of its own, which has nothing of ours, as `python lora_step.py` with a JSON object on its
standard input: trainer ("plain" or "trl"), base (a folder), dtype, threads, repeats, micro_batch, and sequences of
[token ids, where the trained ones begin]. Prints one JSON object: the seconds of the fastest pass but the first, peak
memory, versions. Everything is in one dtype and nothing is computed twice (no checkpointing, no autocast), which is how
both are fastest on a CPU; memory that was freed is kept by what the caller sets in the environment.
"""

import json
import platform
import resource
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def padded(rows, *, left):
    """Ids and mask of the same width."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask


def plain_step(model, batches):
    """−Σ advantage · log π of the trained tokens, with logits of those only."""
    for prompts, answers in batches:
        prompt_ids, prompt_mask = padded(prompts, left=True)
        answer_ids, answer_mask = padded(answers, left=False)
        ids, mask = torch.cat([prompt_ids, answer_ids], 1), torch.cat([prompt_mask, answer_mask], 1)
        ids, mask, answer_ids = ids.to(model.device), mask.to(model.device), answer_ids.to(model.device)
        kept = answer_ids.shape[1] + 1
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=kept).logits[:, :-1]
        chosen = logits.gather(-1, answer_ids[..., None]).squeeze(-1) - logits.logsumexp(-1)
        (-(chosen * answer_mask.to(model.device)).sum()).backward()


def trl_step(trainer, batches):
    """What GRPOTrainer computes of each micro-batch of a step that it has sampled and scored."""
    device, trained = trainer.accelerator.device, sum(len(a) for _, answers in batches for a in answers)
    for prompts, answers in batches:
        prompt_ids, prompt_mask = padded(prompts, left=True)
        answer_ids, answer_mask = padded(answers, left=False)
        inputs = {
            "prompt_ids": prompt_ids.to(device),
            "prompt_mask": prompt_mask.to(device),
            "completion_ids": answer_ids.to(device),
            "completion_mask": answer_mask.to(device),
            "advantages": torch.ones(len(prompts), device=device),
            "num_items_in_batch": torch.tensor(trained, device=device),
        }
        loss = trainer.compute_loss(trainer.model, inputs)
        trainer.accelerator.backward(loss)


def trl_trainer(model, settings, folder, micro_batches):
    """A GRPOTrainer around the model, whose data set nobody reads."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    size = settings["micro_batch"]
    config = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=micro_batches,
        num_generations=size,
        gradient_checkpointing=False,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = GRPOTrainer(
        model=model,
        args=config,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * size}),
        processing_class=AutoTokenizer.from_pretrained(settings["base"]),
    )
    trainer.current_gradient_accumulation_steps = micro_batches  # as its loop sets it
    return trainer


def main():
    """Measure what standard input says."""
    warnings.filterwarnings("ignore")
    settings = json.load(sys.stdin)
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(settings["base"], dtype=getattr(torch, settings["dtype"])).to(device)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    # Those of a length beside each other, so that little is padding.
    split = sorted(((ids[:begin], ids[begin:]) for ids, begin in settings["sequences"]), key=lambda s: len(s[0]))
    size = settings["micro_batch"]
    batches = [tuple(zip(*split[i : i + size], strict=True)) for i in range(0, len(split), size)]
    with tempfile.TemporaryDirectory() as folder:
        if settings["trainer"] == "trl":
            trainer = trl_trainer(model, settings, folder, len(batches))
            model = trainer.model
        model.train()
        seconds = []
        for _ in range(settings["repeats"] + 1):
            start = time.perf_counter()
            if settings["trainer"] == "trl":
                trl_step(trainer, batches)
            else:
                plain_step(model, batches)
            if device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            if not any(bool(gradient.any()) for gradient in gradients):
                raise RuntimeError(f"{settings['trainer']} computed no gradient")
            model.zero_grad(set_to_none=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Linux" else 2**30)
    if device != "cpu":
        peak = torch.cuda.max_memory_allocated() / 2**30
    names = ["torch", "transformers", "peft"] + ["trl"] * (settings["trainer"] == "trl")
    return {
        "seconds": round(min(seconds[1:]), 3),
        "peak_GiB": round(peak, 2),
        "dtype": settings["dtype"],
        "versions": {name: version(name) for name in names},
    }


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):
        found = main()
    print(json.dumps(found))
