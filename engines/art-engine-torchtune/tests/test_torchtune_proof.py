"""What a policy is held against before its first job, run in torchtune's own environment: mistakes that torchtune makes
in silence are refused with the numbers, and settings that its builders lack by name.
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

# Each mistake is made in the module that would make it, and a policy is loaded with it.
PROVE = """
import json, os, runpy, sys
from pathlib import Path

bringing = runpy.run_path(sys.argv[1])["BroughtPackages"]
sys.meta_path.insert(0, bringing(json.loads(os.environ["ART_BROUGHT_PACKAGES"])))

import torch
from art_engine_torchtune.in_environment import adapters, base_model, loading, policy, proof
from art_training_kit.policy import PolicyRequest

llama, qwen, row_order, tree_mask = base_model.llama3_2, base_model.qwen2, base_model.row_order, policy.tree_mask
whole = proof._WHOLE_UP_TO_BYTES

def built_with(**changes):
    return lambda **settings: llama(**{**settings, **changes})

def causal(row, device):
    return torch.ones(len(row), len(row), dtype=torch.bool).tril()

def unscaled(*arguments, **settings):
    layer = lora_linear(*arguments, **settings)
    layer.alpha = layer.rank
    return layer

lora_linear = adapters.LoRALinear
MISTAKES = {
    "none": [],
    "none, in a base of large files": [(proof, "_WHOLE_UP_TO_BYTES", 0)],
    "its own scale_factor": [(base_model, "llama3_2", built_with(scale_factor=32))],
    "another rope_base": [(base_model, "llama3_2", built_with(rope_base=500_000))],
    "another epsilon": [(base_model, "llama3_2", built_with(norm_eps=1e-2))],
    "rows of lora_B in transformers' order": [(base_model, "row_order", lambda rows, heads: torch.arange(rows))],
    "Qwen's rows in Llama's order": [(base_model, "_ORDERED", ("llama", "qwen2"))],
    "alpha that is rank": [(adapters, "LoRALinear", unscaled)],
    "no tree in the mask": [(policy, "tree_mask", causal)],
}
for name, folder in json.loads(sys.argv[2]):
    for module, attribute, wrong in MISTAKES[name]:
        setattr(module, attribute, wrong)
    said = {}
    for dtype in ("float32", "bfloat16"):
        try:
            made = loading.load_policy(PolicyRequest(Path(folder), device="cpu", dtype=dtype))
            said[dtype] = "" if made._trained is None else "the proof's adapter was left in it"
        except Exception as error:
            said[dtype] = f"{type(error).__name__}: {error}"
    print("\\n" + json.dumps([name, said]))
    base_model.llama3_2, base_model.qwen2, base_model.row_order = llama, qwen, row_order
    base_model._ORDERED, adapters.LoRALinear, policy.tree_mask = ("llama",), lora_linear, tree_mask
    proof._WHOLE_UP_TO_BYTES = whole
"""


def proved(cases: list[tuple[str, Path]]) -> list[tuple[str, dict[str, str]]]:
    """What loading a policy says with each mistake, by dtype; nothing where it was loaded."""
    python = python_for(installed_plugins().training_engine("torchtune"), flavour="cpu")
    ran = subprocess.run(
        [python, "-c", PROVE, BRINGING_WORKER, json.dumps([(name, str(folder)) for name, folder in cases])],
        env={**os.environ, **brought("art_engine_torchtune"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return [tuple(json.loads(line)) for line in ran.stdout.splitlines() if line.startswith("[")]  # type: ignore[misc]


def test_a_policy_that_computes_something_else_is_refused_with_the_numbers(random_model: Callable[..., Path]) -> None:
    llama = random_model("llama", rope_theta=1e4, tie_word_embeddings=True)
    qwen = random_model("qwen2", rope_theta=1e6, tie_word_embeddings=True)
    names = re.findall(r'^    "(.+)": \[', PROVE, re.MULTILINE)
    cases = [(name, qwen if name.startswith("Qwen") else llama) for name in names]
    said = proved([*cases, ("none", qwen)])
    assert [name for name, _ in said] == [*names, "none"]
    for name, by_dtype in said:
        for dtype, error in by_dtype.items():
            if name.startswith("none"):
                assert error == "", dtype
                continue
            assert error.startswith("ProofFailed: "), f"{name} was taken in {dtype}: {error}"
            assert re.search(r"apart from transformers' by [\d.]+(e-\d+)? in fp32, where 0.0002", error), error
            assert "art-engine-torch" in error


def test_what_torchtunes_builders_have_no_setting_for_is_refused_by_name(random_model: Callable[..., Path]) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 1e6}
    other_llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 4.0}
    folders = {
        "rope_type is 'yarn'": random_model("qwen2", rope_parameters=yarn),
        "other settings": random_model(
            "llama", rope_parameters={**other_llama3, "original_max_position_embeddings": 8192, "rope_theta": 5e5}
        ),
        "head_dim": random_model("llama", head_dim=32),
        "attention_bias": random_model("llama", attention_bias=True),
        "mlp_bias": random_model("llama", mlp_bias=True),
        "hidden_act is 'gelu'": random_model("llama", hidden_act="gelu"),
        "sliding-window": random_model("qwen2", use_sliding_window=True, max_window_layers=2, sliding_window=64),
        "model_type is 'qwen3'": random_model("qwen3", head_dim=16),
    }
    said = proved([("none", folder) for folder in folders.values()])
    for words, (_, by_dtype) in zip(folders, said, strict=True):
        for error in by_dtype.values():
            assert error.startswith("ValueError: torchtune cannot compute")
            assert words in error
            assert "pip install art-engine-torch" in error
