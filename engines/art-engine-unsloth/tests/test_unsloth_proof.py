"""What a policy is held against before its first job, run in Unsloth's own environment: what would go wrong in silence
is refused with the numbers, and bases that packed rows can't be computed with by name.

Unsloth's own silent mistakes need a GPU. Here the same mistakes are made in its path for a CPU.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from art_core import installed_plugins
from art_runtime.environments import python_for
from art_training_kit.launch import BRINGING_WORKER, brought

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# One base, and one answer of transformers and PEFT, for all mistakes; each is made in a policy and mended again.
PROVE = """
import json, os, runpy, shutil, sys
from dataclasses import replace
from pathlib import Path

bringing = runpy.run_path(sys.argv[1])["BroughtPackages"]
sys.meta_path.insert(0, bringing(json.loads(os.environ["ART_BROUGHT_PACKAGES"])))

import torch
from art_engine_unsloth.in_environment import base_model, loading, policy, proof
from art_training_kit.policy import PolicyRequest

real = {name: getattr(policy.UnslothPolicy, name) for name in ("hidden_states", "_mask", "_put", "_parameters_of")}

def without_mask(self, row):
    return None

def without_tree(self, row):
    return torch.ones(1, 1, len(row), len(row), dtype=torch.bool).tril()

def restarting(self, row):
    return real["hidden_states"](self, replace(row, position_ids=row.position_ids % 8))

def half_scale(self, adapter, name):
    real["_put"](self, adapter, name)
    for p in (p for n, p in self._parameters_of(name).items() if "lora_B" in n):
        p.data /= 2

def without_gradient(self, row):
    hidden = real["hidden_states"](self, row)
    return hidden / 2 + hidden.detach() / 2

MISTAKES = {
    "none": ("hidden_states", real["hidden_states"]),
    "the mask dropped": ("_mask", without_mask),
    "no tree in the mask": ("_mask", without_tree),
    "positions that start again": ("hidden_states", restarting),
    "an adapter changed on its way": ("_put", half_scale),
    "half of the gradient": ("hidden_states", without_gradient),
}

def say(*what):
    print("\\n" + json.dumps(what))

def said_by(work):
    try:
        return work() or ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"

folders = json.loads(sys.argv[2])

def prove_each(made, expected, folder):
    for name, (attribute, wrong) in MISTAKES.items():
        setattr(policy.UnslothPolicy, attribute, wrong)
        shutil.rmtree(expected.folder / "out", ignore_errors=True)
        say(name, said_by(lambda: proof.prove(made, expected, folder)))
        setattr(policy.UnslothPolicy, attribute, real[attribute])
        made.drop_adapter()

loading.prove = prove_each
loading.load_policy(PolicyRequest(Path(folders["base"]), device="cpu", dtype="float32"))
loading.prove = proof.prove
recomputed = {"dtype": "bfloat16", "gradient_checkpointing": True}
made = loading.load_policy(PolicyRequest(Path(folders["base"]), device="cpu", **recomputed))
say("bfloat16, recomputed", "" if made._config is None else "the proof's adapter was left in it")

from transformers import AutoConfig
for name in folders["refused"]:
    def refused():
        base_model.require_family(Path(name))
        base_model.refuse_windows(Path(name), AutoConfig.from_pretrained(name))

    say(name, said_by(refused))
"""


def test_a_policy_that_computes_something_else_is_refused_with_the_numbers(
    random_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = random_model("qwen2", tie_word_embeddings=True, rope_theta=1e6)
    refused = {
        "model_type is 'gpt2', not one of llama": {"model_type": "gpt2"},
        "sliding windows": {"model_type": "mistral", "sliding_window": 64},
        "it has sliding windows": {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2},
    }
    for index, config in enumerate(refused.values()):
        (tmp_path / str(index)).mkdir()
        (tmp_path / str(index) / "config.json").write_text(json.dumps(config), encoding="utf-8")
    folders = {"base": str(base), "refused": [str(tmp_path / str(index)) for index in range(len(refused))]}
    python = python_for(installed_plugins().training_engine("unsloth"), flavour="cpu")
    ran = subprocess.run(
        [python, "-c", PROVE, BRINGING_WORKER, json.dumps(folders)],
        env={**os.environ, **brought("art_engine_unsloth"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    said: dict[str, str] = dict(json.loads(line) for line in ran.stdout.splitlines() if line.startswith('["'))
    for words, folder in zip(refused, folders["refused"], strict=True):
        assert words in said.pop(folder)
    assert said.pop("none") == ""
    assert said.pop("bfloat16, recomputed") == ""
    assert len(said) == len(re.findall(r'^    "(.+)": \(', PROVE, re.MULTILINE)) - 1
    for name, error in said.items():
        assert error.startswith("ProofFailed: "), f"{name} was taken: {error}"
        if name != "an adapter changed on its way":
            assert re.search(r"gradients from those of transformers and PEFT in fp32 by [\d.]+(e[-+]\d+)?,", error), (
                error
            )
            assert "art-engine-torch" in error
