"""What an inference engine and a training engine are: a description and a dialect, never a process.

An engine says which command starts its server and how that server is spoken to. It opens no connection, starts no
process and reads no environment: whoever runs the plan (a backend) makes the calls. A third-party engine is about a
hundred lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from .capabilities import InferenceCapability, TrainingCapability

JSON = dict[str, Any]
Endpoint = Literal["chat/completions", "completions"]


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """How a server process is started and known to be ready.

    `argv` is the whole command line and holds no secret. `env` is added to the environment, and so is `secret_env`,
    which never appears in logs or reprs. The server must listen on the host and port of the launch configuration. It is
    ready once `GET health_path` answers 200, for which it has `ready_timeout_s` seconds; on SIGTERM it has
    `stop_timeout_s` to leave.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    secret_env: Mapping[str, str] = field(default_factory=dict, repr=False)
    health_path: str = "/health"
    ready_timeout_s: float = 300.0
    stop_timeout_s: float = 20.0


@dataclass(frozen=True, kw_only=True)
class InferenceLaunch:
    """What an inference engine is asked to serve.

    `base_model` is a folder of weights, `served_name` the name the base model answers to. `devices` are CUDA indices,
    empty for a CPU. `max_model_len` is in tokens, None for the model's own. `engine_args` are the user's, passed
    through; an engine refuses those it doesn't know with UnknownArgument. `python` is the interpreter of the engine's
    environment.
    """

    base_model: Path
    served_name: str
    host: str
    port: int
    api_key: str = field(repr=False)
    python: str
    max_lora_rank: int = 16
    max_adapters: int = 8
    max_model_len: int | None = None
    dtype: str = "auto"
    devices: tuple[int, ...] = ()
    chat_template: Path | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EngineCall:
    """One control call to an engine's server: `method` on `path`, with `json` as its body, answered within
    `timeout_s`.
    """

    method: Literal["GET", "POST"]
    path: str
    json: JSON | None = None
    timeout_s: float = 60.0
    action: str = "answer"


@runtime_checkable
class InferenceEngine(Protocol):
    """An inference server that speaks the OpenAI API and holds several LoRA adapters, each under a name of its own.

    Methods for a capability that is not declared raise UnsupportedCapability. Those that build a call do no I/O; those
    that read an answer raise EngineRefused with the engine's own reason.
    """

    @property
    def name(self) -> str:
        """The name users ask for it by, such as "torch" or "vllm"."""

    @property
    def capabilities(self) -> frozenset[InferenceCapability]:
        """What it declares."""

    def launch(self, config: InferenceLaunch) -> LaunchPlan:
        """The command that serves `config`. Raises UnknownArgument for an engine argument that does not exist."""

    def load_adapter(self, adapter: str, folder: Path) -> EngineCall:
        """Load the PEFT adapter in `folder` under the name `adapter`, which was never used before."""

    def unload_adapter(self, adapter: str) -> EngineCall:
        """Forget an adapter. Requests under way keep it until they end."""

    def list_adapters(self) -> EngineCall:
        """Ask which adapters are loaded."""

    def read_adapters(self, body: bytes) -> frozenset[str]:
        """The adapters named in the answer to `list_adapters`."""

    def pause(self) -> EngineCall:
        """Stop generating; requests wait. Capability PAUSE."""

    def resume(self) -> EngineCall:
        """Go on generating. Capability PAUSE."""

    def sleep(self) -> EngineCall:
        """Give device memory back. Capability SLEEP."""

    def wake(self) -> EngineCall:
        """Take device memory again. Capability SLEEP."""

    def check_answer(self, call: EngineCall, status: int, body: bytes) -> None:
        """Raise EngineRefused when the answer to a control call means that it was not done."""

    def prepare_request(self, endpoint: Endpoint, body: JSON, adapter: str | None) -> JSON:
        """A user's request as this engine takes it: names the adapter (None: the base model), asks for token ids and
        logprobs.

        Does not change `body`. Raises InvalidRequest, naming the field, for what its server would do nothing with or
        stumble over.
        """

    def read_response(self, endpoint: Endpoint, body: JSON) -> JSON:
        """An answer in the one form: every choice has `token_ids`, `prompt_token_ids` and `logprobs`.

        Token ids are the engine's own. For a response that lacks them it raises EngineRefused.
        """

    def read_chunk(self, endpoint: Endpoint, chunk: JSON) -> JSON:
        """One chunk of a streamed answer in the one form: `choices[].token_ids`, and `prompt_token_ids` on a
        choice's first.
        """


@dataclass(frozen=True, kw_only=True)
class TrainingLaunch:
    """What a training worker is asked to load. `token` guards its loopback server; lengths are in tokens."""

    base_model: Path
    host: str
    port: int
    token: str = field(repr=False)
    python: str
    dtype: str = "auto"
    devices: tuple[int, ...] = ()
    max_seq_length: int = 32768
    init_args: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class TrainingEngine(Protocol):
    """A library that trains LoRA adapters, run as a worker that speaks the wire of `art_engine_kit.training_wire`."""

    @property
    def name(self) -> str:
        """The name users ask for it by, such as "torch" or "unsloth"."""

    @property
    def capabilities(self) -> frozenset[TrainingCapability]:
        """What it declares."""

    def launch(self, config: TrainingLaunch) -> LaunchPlan:
        """The command that starts the worker; its token travels in `secret_env`."""


@dataclass(frozen=True, kw_only=True)
class PluginSpec:
    """A plugin's card: what it is called and where its code is, without importing it.

    `factory` is "module:attribute", called without arguments when the plugin is first used. `summary` is one sentence.
    """

    name: str
    factory: str
    summary: str


@dataclass(frozen=True, kw_only=True)
class InferenceEngineSpec(PluginSpec):
    """The card of an inference engine.

    `environment` is the "module:attribute" of its EnvironmentSpec, None for an engine that lives in the client's own.
    With one, the factory takes `flavour`: `capabilities` are those of every flavour, which an instance made without
    `flavour` declares; an instance made with it may declare more. `recommended_on_gpu`: of several that can run, one
    that says so is taken where there is a GPU and the user names none. `own_server` is one or two sentences on how a
    server that the user runs must have been started for ART to load adapters into it; empty when that can't be done.
    """

    capabilities: frozenset[InferenceCapability] = frozenset()
    environment: str | None = None
    recommended_on_gpu: bool = False
    own_server: str = ""


@dataclass(frozen=True, kw_only=True)
class TrainingEngineSpec(PluginSpec):
    """The card of a training engine; `environment` and `recommended_on_gpu` as for an inference engine."""

    capabilities: frozenset[TrainingCapability] = frozenset()
    environment: str | None = None
    recommended_on_gpu: bool = False
