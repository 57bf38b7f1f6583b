"""What an engine's environment would hold is found out without making it, for CUDA on a machine without a GPU too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from art_core import installed_plugins
from art_core.errors import ProcessFailed
from art_engine_kit.environment import EnvironmentSpec, FlavourSpec
from art_runtime.environments import environment_for
from art_runtime.environments.places import EngineEnvironment
from art_runtime.environments.resolution import resolve

ENGINES = ("vllm", "sglang", "torchtune", "unsloth")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_every_pin_for_cuda_can_be_had(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ART_CACHE_DIR", str(tmp_path))
    registry = installed_plugins()
    known = registry.provided("inference engine")
    spec = registry.inference_engine(engine) if engine in known else registry.training_engine(engine)
    environment = environment_for(spec, "cuda")
    art = Path(sys.executable).with_name("art")
    ran = subprocess.run(
        [art, "engines", "install", engine, "--flavour", "cuda", "--dry-run"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = dict(line.split(" ")[0].split("==") for line in ran.stdout.splitlines())
    taken_out = {canonicalize_name(name) for name in environment.spec.uninstall}
    for line in (*environment.spec.requirements, *environment.spec.without_dependencies):
        wanted = Requirement(line)
        if canonicalize_name(wanted.name) in taken_out or (wanted.marker and not wanted.marker.evaluate()):
            continue
        assert wanted.specifier.contains(found[canonicalize_name(wanted.name)], prereleases=True), line
    assert f"{len(found)} packages, none installed" in ran.stderr
    assert not list(tmp_path.rglob("venv*")), "a dry run made something"


def test_what_cannot_be_had_is_told_in_uvs_words(tmp_path: Path) -> None:
    flavour = FlavourSpec(requirements=("art-no-such-package-7c1==9.9",), probe=("-c", ""))
    spec = EnvironmentSpec(provided_by=("art-no-such-package-7c1",), shown=(), flavours={"cpu": flavour})
    with pytest.raises(ProcessFailed, match="art-no-such-package-7c1"):
        resolve(EngineEnvironment(engine="none", flavour="cpu", spec=flavour, environment=spec, folder=tmp_path))
