"""How fast openpipe-art, or TRL's asynchronous GRPO, makes packed rows of tokenize_pack.py's step, and how full.

Runs in an environment of its own, which has nothing of ours, as `python step_packing.py openpipe-art|trl`, with a JSON
object on its standard input: capacity, repeats, tokenizer (a folder), and groups of [reward, messages and choices], the
choices as a server returns them with their token ids. Prints one JSON object: CPU seconds of one thread, best of
several runs, tokens of all sequences and of all packed rows, and how many rows. Knows public calls of openpipe-art, and
the names by which TRL's trainer does it.
"""

import json
import sys
import time
from contextlib import redirect_stdout
from importlib.metadata import version

import numpy as np
import torch


def best_of(repeats, function):
    """Its result and the seconds of the fastest run."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        result = function()
        seconds.append(time.process_time() - start)
    return result, min(seconds)


def openpipe(settings):
    """tokenize_trajectory_groups and packed_tensors_from_tokenized_results."""
    from art.preprocessing.pack import packed_tensors_from_tokenized_results
    from art.preprocessing.tokenize import tokenize_trajectory_groups
    from openai.types.chat.chat_completion import Choice
    from transformers import AutoTokenizer

    import art

    tokenizer = AutoTokenizer.from_pretrained(settings["tokenizer"])
    groups = [
        art.TrajectoryGroup(
            art.Trajectory(
                messages_and_choices=[Choice.model_validate(x) if "finish_reason" in x else x for x in items],
                reward=reward,
            )
            for reward, items in group
        )
        for group in settings["groups"]
    ]
    results, tokenizing = best_of(
        settings["repeats"],
        lambda: list(
            tokenize_trajectory_groups(tokenizer, groups, allow_training_without_logprobs=False, scale_rewards=True)
        ),
    )
    packed, packing = best_of(
        settings["repeats"],
        lambda: packed_tensors_from_tokenized_results(results, settings["capacity"], pad_token_id=-100, verbosity=0),
    )
    tokens = packed["tokens"]
    return {
        "tokenizing": tokenizing,
        "packing": packing,
        "tokens": sum(len(result.token_ids) for result in results),
        "packed": int((tokens != -100).sum()),
        "rows": len(tokens),
    }


def trl(settings):
    """What its rollout worker makes of turns, and its planner and collator of that."""
    from trl.experimental.async_grpo.async_grpo_trainer import TokenBudgetBatcher
    from trl.experimental.async_grpo.async_rollout_worker import TurnRecord, _chain_to_sequences

    conversations = []
    for number, group in enumerate(settings["groups"]):
        mean = sum(reward for reward, _ in group) / len(group)
        for reward, items in group:
            turns = [
                TurnRecord(
                    choice["prompt_token_ids"],
                    choice["token_ids"],
                    [token["logprob"] for token in choice["logprobs"]["content"]],
                )
                for choice in items
                if "finish_reason" in choice
            ]
            conversations.append((number, reward - mean, turns))

    def tokenize():
        return [
            {
                "input_ids": np.asarray(sequence.input_ids, dtype=np.int64),
                "completion_mask": np.asarray(sequence.completion_mask, dtype=np.int64),
                "old_log_probs": np.asarray(sequence.old_log_probs, dtype=np.float32),
                "advantage": advantage,
                "group_id": number,
            }
            for number, advantage, turns in conversations
            for sequence in _chain_to_sequences(turns, str(number), 1024)[0]
        ]

    samples, tokenizing = best_of(settings["repeats"], tokenize)

    # The batcher gives a row when the next sample doesn't fit in it, and its source never ends: this one fits in none.
    full = settings["capacity"]
    last = {"input_ids": np.zeros(full, np.int64), "completion_mask": np.zeros(full, np.int64), "group_id": None}

    def pack():
        return [row.pack() for (row,) in TokenBudgetBatcher([*samples, last], 1, full, {})]

    packed, packing = best_of(settings["repeats"], pack)
    return {
        "tokenizing": tokenizing,
        "packing": packing,
        "tokens": sum(len(sample["input_ids"]) for sample in samples),
        "packed": sum(len(row["input_ids"]) for row in packed),
        "rows": len(packed),
    }


def main():
    """Measure what standard input says."""
    torch.set_num_threads(1)
    name = sys.argv[1]
    settings = json.load(sys.stdin)
    with redirect_stdout(sys.stderr):
        found = {"openpipe-art": openpipe, "trl": trl}[name](settings)
    print(json.dumps({"version": version(name), **found}))


if __name__ == "__main__":
    main()
