"""One forward and backward pass of LoRA training by plain transformers and PEFT, or by TRL's GRPOTrainer.

Runs in an environment of its own, which has nothing of ours, as `python lora_step.py` with a JSON object on its
standard input: trainer ("plain" or "trl"), base (a folder), lora (LoraConfig's), dtype, threads, repeats, micro_batch,
and sequences of [token ids, where the trained ones begin]. Prints one JSON object: the seconds of the fastest pass but
the first, and peak memory. Everything is in one dtype and nothing is computed twice (no checkpointing, no autocast),
which is how both are fastest on a CPU; memory that was freed is kept by what the caller sets in the environment.
"""

import json
import platform
import resource
import sys
import tempfile
import time
from contextlib import redirect_stdout

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def padded(rows, *, left, device):
    """Ids and mask of the same width."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)


def micro_batches_of(sequences, size, device):
    """What GRPOTrainer's loss reads of each micro-batch; those of a length beside each other, so little is padding."""
    split = sorted(((ids[:begin], ids[begin:]) for ids, begin in sequences), key=lambda s: len(s[0]))
    trained = torch.tensor(sum(len(answer) for _, answer in split), device=device)
    batches = []
    for start in range(0, len(split), size):
        prompts, answers = zip(*split[start : start + size], strict=True)
        prompt_ids, prompt_mask = padded(prompts, left=True, device=device)
        answer_ids, answer_mask = padded(answers, left=False, device=device)
        batches.append(
            {
                "prompt_ids": prompt_ids,
                "prompt_mask": prompt_mask,
                "completion_ids": answer_ids,
                "completion_mask": answer_mask,
                "advantages": torch.ones(len(prompts), device=device),
                "num_items_in_batch": trained,
            }
        )
    return batches


def plain_step(model, batches):
    """−Σ advantage · log π of the trained tokens, with logits of those only."""
    for batch in batches:
        answers, mask = batch["completion_ids"], batch["completion_mask"]
        logits = model(
            input_ids=torch.cat([batch["prompt_ids"], answers], 1),
            attention_mask=torch.cat([batch["prompt_mask"], mask], 1),
            logits_to_keep=answers.shape[1] + 1,
        ).logits[:, :-1]
        chosen = logits.gather(-1, answers[..., None]).squeeze(-1) - logits.logsumexp(-1)
        (-(batch["advantages"][:, None] * chosen * mask).sum()).backward()


def trl_step(trainer, batches):
    """What GRPOTrainer computes of each micro-batch of a step that it has sampled and scored."""
    for batch in batches:
        trainer.accelerator.backward(trainer.compute_loss(trainer.model, batch))


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
    settings = json.load(sys.stdin)
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(settings["base"], dtype=getattr(torch, settings["dtype"])).to(device)
    model = get_peft_model(model, LoraConfig(**settings["lora"]), autocast_adapter_dtype=False)
    batches = micro_batches_of(settings["sequences"], settings["micro_batch"], device)
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
    return {"seconds": round(min(seconds[1:]), 3), "peak_GiB": round(peak, 2), "dtype": settings["dtype"]}


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):
        found = main()
    print(json.dumps(found))
