"""Tiny random models, a byte-level tokenizer and adapters with real weights, for the tests of the inference server."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from art_engine_torch.server.app import InferenceApp
from art_engine_torch.server.decoder import Decoder
from art_engine_torch.server.engine import InferenceEngineThread
from art_engine_torch.server.prompts import Prompts
from art_engine_torch.server.scheduler import Limits, Scheduler
from art_engine_torch.server.vocabulary import Vocabulary

KEY = "a-test-key"
BASE = "tiny"
CONTEXT = 512
WAIT_S = 60.0
CHAT_TEMPLATE = (
    "{% for t in tools or [] %}<tool>{{ t | tojson }}</tool>{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments.items() | list }}{% endfor %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}{{ suffix or '' }}"
)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]
VOCAB = 320
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: any text round-trips, and no two texts share ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(kind: str, folder: Path) -> Path:
    """A random model of one shape, with weights large enough that its distributions are far from flat."""
    torch.manual_seed(7)
    if kind == "llama-tied":
        model: Any = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    elif kind == "llama-untied-rope-scaled":
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE))
    elif kind == "llama-biased":
        model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))
    elif kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=False))
    else:
        raise AssertionError(kind)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    model.generation_config.eos_token_id = SIZES["eos_token_id"]
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def make_adapter(
    base: Path, folder: Path, *, rank: int = 4, seed: int = 1, modules: list[str] | None = None, **options: Any
) -> Path:
    """A PEFT adapter, saved by PEFT, whose effect on the model is large."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=modules or MODULES, task_type="CAUSAL_LM", **options
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def reference_logprobs(base: Path, adapter: Path | None, tokens: list[int]) -> torch.Tensor:
    """log softmax of transformers' own logits (with PEFT's adapter) after each token, [tokens, vocabulary]."""
    from peft import PeftModel

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        logits = model.eval()(torch.tensor([tokens])).logits[0]
    return torch.log_softmax(logits.double(), -1)


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny matrices gain nothing from several threads, and lose much beside other tests on the same cores."""
    before = torch.get_num_threads()
    if request.node.get_closest_marker("slow") is None:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_model("qwen3")` gives the folder of such a model; made once a session."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_model(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


@pytest.fixture(scope="session")
def tiny_adapters(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters of the tied Llama, of different ranks and modules, each unlike the others."""
    base = tiny_model("llama-tied")
    folder = tmp_path_factory.mktemp("adapters")
    return [
        make_adapter(base, folder / "one", rank=4, seed=1),
        make_adapter(base, folder / "two", rank=8, seed=2, modules=["q_proj", "v_proj", "down_proj"]),
        make_adapter(base, folder / "three", rank=2, seed=3, use_rslora=True),
    ]


@dataclass
class Server:
    """One running server. `failures` holds what ended its engine."""

    url: str
    engine: InferenceEngineThread
    failures: list[BaseException]
    folder: Path
    prompts: Prompts

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {KEY}"}


@contextlib.contextmanager
def serve(folder: Path, *, trust_templates: bool = True, **limits: int) -> Iterator[Server]:
    vocabularies: list[Vocabulary] = []
    failures: list[BaseException] = []
    sizes = {
        "max_len": CONTEXT,
        "max_sequences": 32,
        "batch_tokens": 128,
        "cache_tokens": 64 * 1024,
        "prefix_bytes": 1 << 26,
    }

    def build() -> Scheduler:
        torch.set_num_threads(1)  # of the engine's own thread, for the reason above
        decoder = Decoder.load(folder, torch.device("cpu"), torch.float32, CONTEXT)
        vocabularies.append(Vocabulary(folder, size=decoder.shape.vocab))
        return Scheduler(decoder, Limits(**{**sizes, **limits}))

    engine = InferenceEngineThread(
        build, served_name=BASE, max_adapters=3, max_lora_rank=16, on_failure=failures.append
    )
    prompts = Prompts(folder, chat_template=None, trust_templates=trust_templates, on_failure=failures.append)
    app = InferenceApp(engine, lambda: vocabularies[0], prompts, served_name=BASE, api_key=KEY)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app.asgi, loop="asyncio", log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    engine.start()
    thread.start()
    deadline = time.monotonic() + WAIT_S
    while not (server.started and engine.ready and prompts.ready) and not failures and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.started
    assert (engine.ready and prompts.ready) or failures
    try:
        yield Server(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, failures, folder, prompts)
    finally:
        engine.stop(WAIT_S)
        server.should_exit = True
        thread.join(WAIT_S)


def edit_json(path: Path, **changes: Any) -> None:
    """Changes fields of a JSON file; a value of None takes the field out."""
    data = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}), encoding="utf-8")


@pytest.fixture(scope="session")
def adapter_maker() -> Callable[..., Path]:
    """`make_adapter`, for tests that need adapters of their own."""
    return make_adapter


@pytest.fixture(scope="session")
def reference() -> Callable[[Path, Path | None, list[int]], torch.Tensor]:
    """`reference_logprobs`: what transformers and PEFT say."""
    return reference_logprobs


@pytest.fixture(scope="session")
def json_editor() -> Callable[..., None]:
    """`edit_json`."""
    return edit_json


@pytest.fixture(scope="session")
def serving() -> Callable[..., Any]:
    """`serve`: a context manager that runs the real server on a model's folder."""
    return serve


@pytest.fixture(scope="module")
def server(tiny_model: Callable[[str], Path]) -> Iterator[Server]:
    """A server of a tiny Llama, for all tests of a module."""
    with serve(tiny_model("llama-tied")) as running:
        yield running


@pytest.fixture
async def http(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    """A client of it that has the key. Adapters are gone afterwards."""
    async with httpx.AsyncClient(base_url=server.url, headers=server.headers, timeout=WAIT_S) as client:
        yield client
        for name in server.engine.adapter_names():
            server.engine.unload_adapter(name)
