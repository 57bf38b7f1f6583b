"""The launch plan that every training engine's worker has, for engines to return as it is or with more environment.

Knows the worker's command line; imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from art_core.engines import LaunchPlan, TrainingLaunch
from art_core.errors import UnknownArgument
from art_engine_kit.environment import cuda_env
from art_engine_kit.training_wire import WORKER_TOKEN

# What the worker itself is made of.
KITS: Final = ("art_core", "art_engine_kit", "art_training_kit")
# What an environment of an engine's own must hold for it, beside torch.
KIT_REQUIREMENTS: Final = (
    "filelock>=3.16",
    "numpy>=1.26",
    "openai>=2.0,<4",
    "packaging>=24.0",
    "platformdirs>=4.3",
    "pluggy>=1.5,<2",
    "pydantic>=2.9,<3",
    "safetensors>=0.5",
    "starlette>=0.40",
    "tqdm>=4.66",
    "typing-extensions>=4.12",
    "uvicorn>=0.30",
)
BRINGING_WORKER: Final = Path(__file__).with_name("in_environment") / "art_training_worker.py"


def refuse_unfit(config: TrainingLaunch, *, engine: str, init_args: Collection[str]) -> None:
    """Raise ValueError for several devices, since the shared worker trains on one, and UnknownArgument for one that is
    not among the engine's `init_args`.
    """
    if len(config.devices) > 1:
        raise ValueError(
            f"Engine {engine} trains on one device, not on {len(config.devices)} ({config.devices}): give one id in"
            " trainer_gpu_ids."
        )
    for name in config.init_args:
        if name not in init_args:
            raise UnknownArgument(name, where=f"init_args of the {engine} training engine", known=init_args)


def worker_plan(
    config: TrainingLaunch, policy: str, env: Mapping[str, str] | None = None, *, brings: str | None = None
) -> LaunchPlan:
    """Run `policy`, a "module:attr" naming a PolicyFactory, in the shared worker.

    Of `config.init_args`, `gradient_checkpointing` (True, False, or None for automatic) is the worker's own; the others
    reach the factory. `brings` is the package of an engine with an environment of its own: that package and the kits
    are taken from here, everything else from there. What the kits need must be there: see `KIT_REQUIREMENTS`.
    """
    init_args = dict(config.init_args)
    checkpointing = init_args.pop("gradient_checkpointing", None)
    argv = [
        config.python, *(("-m", "art_training_kit.worker") if brings is None else (str(BRINGING_WORKER),)),
        "--policy", policy,
        "--base-model", str(config.base_model),
        "--host", config.host,
        "--port", str(config.port),
        "--device", "cuda:0" if config.devices else "cpu",
        "--dtype", config.dtype,
        "--max-seq-length", str(config.max_seq_length),
        "--init-args", json.dumps(init_args),
    ]  # fmt: skip
    if checkpointing is not None:
        argv += ["--gradient-checkpointing", "on" if checkpointing else "off"]
    return LaunchPlan(
        argv=tuple(argv),
        env={**(brought(brings) if brings else {}), **(env or {}), **cuda_env(config.devices)},
        secret_env={WORKER_TOKEN: config.token},
    )


def brought(package: str) -> dict[str, str]:
    """The variables with which `BRINGING_WORKER` finds the kits and `package` where they are installed here."""
    folders = {name: str(_folder_of(name)) for name in (*KITS, package)}
    # Nothing else that the client's process imports may reach the environment.
    return {"PYTHONPATH": "", "ART_BROUGHT_PACKAGES": json.dumps(folders)}


def _folder_of(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the package {package} is not installed in this environment", name=package)
    return Path(spec.origin).parent
