"""What is in every distribution's wheel, and that the set of them works in a clean environment."""

from __future__ import annotations

import json
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROJECTS = [
    ROOT,
    *sorted(p.parent for pattern in ("engines/*", "plugins/*") for p in ROOT.glob(f"{pattern}/pyproject.toml")),
    ROOT / "conformance_tests",
]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SERVE = """
import asyncio, sys
import art
from art.local import LocalBackend


async def main():
    async with LocalBackend(in_process=True, path="runs") as backend:
        model = art.TrainableModel(name="agent", project="wheels", base_model=sys.argv[1], base_path="runs")
        await model.register(backend)
        client = model.openai_client()
        completion = await client.chat.completions.create(
            model=model.name, messages=[{"role": "user", "content": "hello"}], max_tokens=4, n=2)
        for choice in completion.choices:
            assert choice.policy_version == 0, choice
            assert choice.token_ids and choice.prompt_token_ids, choice
        print("answered by", completion.model)
    assert "torch" not in sys.modules


asyncio.run(main())
"""


def opened(wheels: Path) -> Iterator[tuple[dict[str, Any], zipfile.ZipFile, str]]:
    for project in PROJECTS:
        declared = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        stem = f"{declared['name'].replace('-', '_')}-{declared['version']}"
        with zipfile.ZipFile(wheels / f"{stem}-py3-none-any.whl") as wheel:
            yield declared, wheel, f"{stem}.dist-info"


def test_every_wheel_says_what_its_project_says(wheels: Path) -> None:
    for declared, wheel, info in opened(wheels):
        metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
        assert (metadata["Name"], metadata["Version"]) == (declared["name"], declared["version"])
        assert metadata["Requires-Python"] == ">=3.11"
        assert metadata["License-Expression"] == "Apache-2.0"
        required = metadata.get_all("Requires-Dist") or []
        assert len([line for line in required if "extra ==" not in line]) == len(declared["dependencies"])
        assert declared["name"] in str(metadata.get_payload())
        points = declared.get("entry-points", {}).get("art", {})
        if points:
            written = wheel.read(f"{info}/entry_points.txt").decode()
            assert all(f"{name} = {target}" in written for name, target in points.items())


def test_every_wheel_holds_its_package_and_nothing_else(wheels: Path) -> None:
    for declared, wheel, info in opened(wheels):
        tops = {name.partition("/")[0] for name in wheel.namelist()}
        packages = {"art_core", "art"} if declared["name"] == "art-core" else {declared["name"].replace("-", "_")}
        assert tops == packages | {info}
        for package in packages:
            assert f"{package}/py.typed" in wheel.namelist()
        # The kit's templates have tests of their own.
        names = [name for name in wheel.namelist() if not name.startswith("art/plugin_templates/")]
        assert not [name for name in names if "__pycache__" in name or "/tests/" in name]


def test_the_core_s_wheel_holds_the_licence(wheels: Path) -> None:
    for declared, wheel, info in opened(wheels):
        if declared["name"] == "art-core":
            assert "Apache License" in wheel.read(f"{info}/licenses/LICENSE").decode()


def test_the_set_installs_into_a_clean_environment_and_is_sound(environment: Any, tmp_path: Path) -> None:
    checked = environment.run("art", "plugins", "check", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    listed = environment.run("art", "plugins", "--json", cwd=tmp_path)
    provided = {what for row in json.loads(listed.stdout) for what in row["provides"]}
    assert {"backend local", "inference engine torch", "training engine torch"} <= provided
    where = environment.run(
        "python", "-c", "import art, art_core; print(art.__file__, art_core.__file__)", cwd=tmp_path
    )
    assert where.returncode == 0
    assert str(ROOT) not in where.stdout


def test_a_model_is_served_from_the_clean_environment(environment: Any, tiny_base_model: Path, tmp_path: Path) -> None:
    (tmp_path / "serve.py").write_text(SERVE, encoding="utf-8")
    ran = environment.run("python", "serve.py", str(tiny_base_model), cwd=tmp_path, timeout=300)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert "answered by agent@0" in ran.stdout
