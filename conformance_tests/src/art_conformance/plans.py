"""What inference and training engines are held to alike: the launch plan. Starts nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import PurePath

from art_core import LaunchPlan


def words_of(plan: LaunchPlan) -> list[str]:
    """Everything that the process will be told openly."""
    return [*plan.argv, *plan.env.values()]


def check_secret(plan: LaunchPlan, secret: str) -> None:
    """The secret is in secret_env and nowhere else."""
    assert secret in plan.secret_env.values(), "the secret is not in secret_env, so the server can't know it"
    assert not any(secret in word for word in plan.argv), (
        "the secret is in argv, where every user of the machine sees it"
    )
    assert not any(secret in value for value in plan.env.values()), "the secret is in env; it belongs into secret_env"
    assert secret not in repr(plan), "the repr of the plan shows the secret"


def check_plan_is_pure(make: Callable[[], LaunchPlan]) -> None:
    """Two plans are equal, well formed, and nothing outside changed."""
    environment, folder = dict(os.environ), os.getcwd()
    plan = make()
    assert plan == make(), "the same configuration gave two different plans"
    assert dict(os.environ) == environment, "making a plan changed the environment"
    assert os.getcwd() == folder, "making a plan changed the working folder"
    assert plan.argv
    assert all(isinstance(word, str) for word in plan.argv)
    assert all(isinstance(text, str) for pair in (*plan.env.items(), *plan.secret_env.items()) for text in pair)
    assert plan.health_path.startswith("/")
    assert plan.ready_timeout_s > 0
    assert plan.stop_timeout_s > 0


def check_interpreter(plan: LaunchPlan, python: str) -> None:
    """The first word is the interpreter or lies in its folder."""
    assert plan.argv[0] == python or PurePath(plan.argv[0]).parent == PurePath(python).parent, (
        f"it runs {plan.argv[0]}, which is not {python} and not beside it"
    )


def check_devices(make: Callable[[tuple[int, ...]], LaunchPlan]) -> None:
    """One GPU is shown as that one, none as none."""
    shown = make((3,)).env.get("CUDA_VISIBLE_DEVICES")
    assert shown == "3", f"devices=(3,) is shown as CUDA_VISIBLE_DEVICES={shown!r}"
    hidden = make(()).env.get("CUDA_VISIBLE_DEVICES")
    assert hidden in ("", "-1"), f"on a CPU the GPUs are not hidden: CUDA_VISIBLE_DEVICES={hidden!r}"
