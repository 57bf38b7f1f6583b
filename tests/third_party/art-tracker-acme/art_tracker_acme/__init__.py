"""Acme's tracker: one line of text a metric, and one a trajectory, in `acme.log` beside the model's other files."""

from pathlib import Path

from art_core import ModelKey, hookimpl

art_api = 1


@hookimpl
def art_log_metrics(model, metrics, step, split):
    _write(model, [f"{split} {step} {name} {value:g}" for name, value in sorted(metrics.items())])


@hookimpl
def art_log_trajectories(model, trajectory_groups, step, split):
    rewards = [trajectory.reward for group in trajectory_groups for trajectory in group]
    _write(model, [f"{split} {step} trajectory {reward:g}" for reward in rewards])


def _write(model, lines):
    folder = ModelKey(model.project, model.name).folder(Path(model.base_path))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "acme.log").open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
