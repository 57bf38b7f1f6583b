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
# What users may give to every engine.
OWN_INIT_ARGS: Final = ("gradient_checkpointing", "ranks")
BRINGING_WORKER: Final = Path(__file__).with_name("in_environment") / "art_training_worker.py"


def refuse_unfit(config: TrainingLaunch, *, engine: str, init_args: Collection[str]) -> None:
    """Raise UnknownArgument for one that is not among the engine's `init_args` or the worker's own, and ValueError for
    `ranks` that the devices don't allow.
    """
    known = (*init_args, *OWN_INIT_ARGS)
    for name in config.init_args:
        if name not in known:
            raise UnknownArgument(name, where=f"init_args of the {engine} training engine", known=known)
    ranks_of(config)


def ranks_of(config: TrainingLaunch) -> int:
    """How many processes train: one for each GPU, and on a CPU as many as `init_args` has for `ranks`, usually one.

    Raises ValueError for a number that can't be, and for one that isn't the number of GPUs.
    """
    wanted = config.init_args.get("ranks")
    gpus = len(config.devices)
    if wanted is None:
        return gpus or 1
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise ValueError(f"init_args: ranks must be a whole number of processes, at least 1, not {wanted!r}.")
    if gpus and wanted != gpus:
        raise ValueError(
            f"init_args: ranks={wanted}, but {gpus} GPUs train ({list(config.devices)}), each with a process of its"
            " own: leave ranks out, or change trainer_gpu_ids."
        )
    return int(wanted)


def worker_plan(
    config: TrainingLaunch, policy: str, env: Mapping[str, str] | None = None, *, brings: str | None = None
) -> LaunchPlan:
    """Run `policy`, a "module:attr" naming a PolicyFactory, in the shared worker.

    Of `config.init_args` two are the worker's own, `gradient_checkpointing` (True, False, or None for automatic) and
    `ranks`; the others reach the factory. `brings` is the package of an engine with an environment of its own: that
    package and the kits are taken from here, everything else from there. What the kits need must be there: see
    `KIT_REQUIREMENTS`.
    """
    init_args = dict(config.init_args)
    checkpointing, ranks = init_args.pop("gradient_checkpointing", None), ranks_of(config)
    init_args.pop("ranks", None)
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
    if ranks > 1:
        argv += ["--ranks", str(ranks)]
    return LaunchPlan(
        argv=tuple(argv),
        env={**(brought(brings) if brings else {}), **(env or {}), **cuda_env(config.devices)},
        secret_env={WORKER_TOKEN: config.token},
    )


def brought(package: str) -> dict[str, str]:
    """The variables with which `BRINGING_WORKER` finds the kits and `package` where they are installed here."""
    folders = {name: str(_folder_of(name)) for name in (*KITS, package)}
    return {
        # Nothing else that the client's process imports may reach the environment.
        "PYTHONPATH": "",
        # Its modules are compiled once, not at every start, even where the client's process keeps no bytecode.
        "PYTHONDONTWRITEBYTECODE": "",
        "ART_BROUGHT_PACKAGES": json.dumps(folders),
    }


def _folder_of(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the package {package} is not installed in this environment", name=package)
    return Path(spec.origin).parent
