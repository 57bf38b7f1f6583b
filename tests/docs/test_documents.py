"""The documents hold: their Python blocks run, their lists of hooks, options and settings are the code's, links lead
somewhere.

A block ```` ```python ```` runs in the fast test; one marked `backend` needs real weights and runs in the slow one,
together with its page's others; one marked `file=...` is a file of a project, which other tests install and check; one
marked `verifiers` needs that package and runs in the environment that has it (`make test-verifiers`).
"""

from __future__ import annotations

import ast
import asyncio
import importlib
import inspect
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from art.plugin_kit import PluginKind, plan_plugin, write_plugin
from art_core import InferenceLaunch, PluginRegistry, hookspecs
from art_core.publication import PublicationStage
from art_core.registry import instantiate
from art_engine_kit.adapter_config import HARMLESS, PLAIN_INITS, REFUSED, AdapterConfig
from art_engine_kit.options_table import options_table
from art_engine_kit.train_options import TrainOptions

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
READMES = sorted(p for p in ROOT.glob("*/*/README.md") if not p.relative_to(ROOT).parts[0].startswith("."))
TOP_LEVEL = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the words after it, its text, and the line on which that begins."""

    language: str
    marks: tuple[str, ...]
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The path that the block is the content of."""
        return next((mark.removeprefix("file=") for mark in self.marks if mark.startswith("file=")), None)


def blocks_of(page: Path) -> Iterator[Block]:
    content = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(content):
        language, *marks = shlex.split(match["info"]) or [""]
        yield Block(language, tuple(marks), match["text"], content[: match.start("text")].count("\n") + 1)


def runnable(page: Path, *, with_backend: bool) -> list[Block]:
    python = [block for block in blocks_of(page) if block.language == "python" and block.file is None]
    here = [block for block in python if "verifiers" not in block.marks]
    return [block for block in here if with_backend or "backend" not in block.marks]


def run_blocks(page: Path, blocks: list[Block]) -> dict[str, Any]:
    """Run blocks in order in one namespace, with `await` allowed at the top, as in a notebook."""
    module = ModuleType(f"page_{page.stem.replace('-', '_')}")

    async def run() -> None:
        for block in blocks:
            # Lines are counted as in the page, so that a traceback points into it.
            source = "\n" * (block.line - 1) + block.text
            code = compile(source, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
            outcome = eval(code, module.__dict__)
            if inspect.isawaitable(outcome):
                await outcome

    asyncio.run(run())
    return module.__dict__


def pages_with(*, backend: bool) -> list[Any]:
    wanted = [
        page
        for page in PAGES
        if page.exists()
        and (
            any("backend" in block.marks for block in blocks_of(page))
            if backend
            else runnable(page, with_backend=False)
        )
    ]
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in wanted]


@pytest.mark.parametrize("page", pages_with(backend=False))
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(page, runnable(page, with_backend=False))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", pages_with(backend=True))
def test_the_python_of_a_page_runs_with_a_real_backend(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        names = run_blocks(page, runnable(page, with_backend=True))
    finally:
        # A page may leave servers running on purpose; they are this test's to end.
        subprocess.run(
            [sys.executable, "-m", "art_core", "down", "--path", str(tmp_path / ".art")], timeout=120, check=False
        )
    if page.name == "training.md":
        documented = set(table_of(page, "metric"))
        assert set(names["result"].metrics) <= documented, "the training engine gives metrics that the page lacks"


def test_every_page_has_only_marks_that_mean_something() -> None:
    for page in PAGES:
        for block in blocks_of(page) if page.exists() else ():
            if block.language == "python":
                known = ("backend", "verifiers")
                assert all(mark in known or mark.startswith("file=") for mark in block.marks), (page, block)


def test_links_between_pages_lead_somewhere() -> None:
    for page in (*PAGES, *READMES):
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8") if page.exists() else ""):
            if not target.startswith(("http:", "https:")):
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_every_module_and_path_that_the_architecture_names_is_there() -> None:
    named = re.findall(r"`([^`\s]+)`", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    modules = [name for name in named if re.fullmatch(r"art(_[a-z]+)*(\.\w+)+", name)]
    paths = [name for name in named if name.partition("/")[0] in TOP_LEVEL and "/" in name]
    assert len(modules) > 40
    assert len(paths) > 10
    for name in modules:
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError) as error:
            raise AssertionError(f"docs/architecture.md names {name}: {error}") from error
    for name in paths:
        assert (ROOT / name).exists(), name


def table_of(page: Path, first_column: str) -> dict[str, list[str]]:
    """The rows of the table whose first column has this title, by their first cell without backquotes."""
    lines = page.read_text(encoding="utf-8").splitlines()
    (start,) = [n for n, line in enumerate(lines) if line.startswith(f"| {first_column} |")]
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        first, *others = (cell.strip() for cell in line.strip("|").split(" | "))
        rows[first.strip("| `")] = [cell.strip("| ") for cell in others]
    return rows


def test_the_pages_of_hooks_and_protocols_are_what_the_docstrings_say() -> None:
    command = [sys.executable, str(Path(__file__).with_name("interface_reference.py")), "--check"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert made.returncode == 0, made.stderr


def test_the_page_of_hooks_has_every_hook_under_its_kind() -> None:
    text = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
    found = {}
    for section in text.split("\n## ")[1:]:
        for name, arguments in re.findall(r"^### `(art_\w+)\(([^)]*)\)`$", section, re.MULTILINE):
            found[name] = ([each for each in arguments.split(", ") if each], section.partition("\n")[0])
    real = {name for name in vars(hookspecs) if name.startswith("art_")}
    assert found == {
        name: (list(inspect.signature(getattr(hookspecs, name)).parameters), kind_of(name)) for name in real
    }


def kind_of(hook: str) -> str:
    if hook.startswith("art_register_"):
        return "Collected"
    if getattr(hookspecs, hook).art_spec["firstresult"]:
        return "First result"
    return "May refuse" if hook.startswith("art_before_") else "Announced"


def test_every_protocol_that_the_kernel_has_is_on_its_page() -> None:
    text = (ROOT / "docs" / "protocols.md").read_text(encoding="utf-8")
    modules = [importlib.import_module(f"art_core.{name}") for name in ("backend", "engines", "publication", "steps")]
    protocols = {
        name for module in modules for name, value in vars(module).items() if getattr(value, "_is_protocol", False)
    } - {"Protocol"}
    assert len(protocols) >= 7
    shown = set(re.findall(r"^### `[\w.]+\.(\w+)`$", text, re.MULTILINE))
    assert protocols <= shown, protocols - shown


def test_the_page_of_options_is_the_options() -> None:
    page = ROOT / "docs" / "training.md"
    assert options_table() in page.read_text(), "put in what `python -m art_engine_kit.options_table` prints"
    assert list(table_of(page, "option")) == list(TrainOptions.model_fields)
    assert all(field.description for field in TrainOptions.model_fields.values())


def test_the_page_of_adapters_has_every_setting_of_pefts() -> None:
    rows = table_of(ROOT / "docs" / "adapters.md", "setting")
    fates = {name: row for names, row in rows.items() for name in re.findall(r"\w+", names)}
    assert set(fates) == {*AdapterConfig.model_fields, *HARMLESS, *REFUSED, "init_lora_weights"}
    for names, beginning in ((HARMLESS, "passed over"), (REFUSED, "refused unless off")):
        assert {name for name, row in fates.items() if row[0].startswith(beginning)} == set(names)
    assert all(f"`{init}`" in fates["init_lora_weights"][0] for init in PLAIN_INITS)


def test_the_page_of_publication_has_every_stage() -> None:
    rows = table_of(ROOT / "docs" / "publication.md", "stage")
    assert list(rows) == [stage.value for stage in PublicationStage]


@pytest.fixture
def projects(tmp_path: Path) -> Path:
    """The projects of writing-a-plugin.md, written to disk."""
    for block in blocks_of(ROOT / "docs" / "writing-a-plugin.md"):
        if block.file is not None:
            file = tmp_path / "projects" / block.file
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
    return tmp_path / "projects"


@pytest.fixture
def engine(projects: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The page's engine, made from its card."""
    monkeypatch.syspath_prepend(str(projects / "art-engine-mine"))
    registry = PluginRegistry()
    from art_engine_mine import plugin  # type: ignore[import-not-found,unused-ignore]

    registry.register(plugin, name="mine")
    yield instantiate(registry.inference_engine("mine"))
    for name in [name for name in sys.modules if name.startswith("art_engine_mine")]:
        del sys.modules[name]


def test_the_ten_lines_are_ten_and_a_plugin(
    projects: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (projects / "art-bell" / "art_bell.py").read_text(encoding="utf-8")
    assert len([line for line in source.splitlines() if line.strip()]) <= 10
    monkeypatch.syspath_prepend(str(projects / "art-bell"))
    import art_bell  # type: ignore[import-not-found,unused-ignore]

    from art_core import ModelKey, PublicationReceipt, announce

    registry = PluginRegistry()
    registry.register(art_bell, name="bell")
    receipt = PublicationReceipt(model=ModelKey("p", "agent"), step=3, inference_name="agent@3")
    asyncio.run(announce(registry, "art_checkpoint_published", model=None, checkpoint=None, receipt=receipt))
    assert capsys.readouterr().out == "\aagent@3 is served\n"


def test_the_engine_of_the_page_is_what_the_kit_writes(projects: Path, tmp_path: Path) -> None:
    kit = tmp_path / "kit"
    written = write_plugin(plan_plugin("mine", PluginKind.INFERENCE_ENGINE, PluginRegistry()), kit)
    shown = [file for file in written if (projects / "art-engine-mine" / file).exists()]
    assert len(shown) == 4
    for file in shown:
        assert (projects / "art-engine-mine" / file).read_text("utf-8") == (kit / file).read_text("utf-8"), file


def test_the_engine_of_the_page_makes_a_plan_without_a_secret_in_it(engine: Any, tmp_path: Path) -> None:
    launch = InferenceLaunch(
        base_model=tmp_path,
        served_name="base",
        host="127.0.0.1",
        port=12345,
        api_key="secret-key",
        python=sys.executable,
        engine_args={"threads": 2},
    )
    plan = engine.launch(launch)
    assert plan.argv[:3] == (sys.executable, "-m", "art_engine_torch.server")
    assert plan.argv[-2:] == ("--threads", "2")
    assert "secret-key" not in repr(plan)
    lines = [line for line in inspect.getsource(type(engine)).splitlines() if line.strip()]
    assert len(lines) <= 100


@pytest.mark.slow
def test_the_projects_of_the_page_install(projects: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
    subprocess.run([*pip, *map(str, sorted(projects.iterdir()))], check=True, timeout=300)
    env = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "100", "OMP_NUM_THREADS": "1"}

    def art(*arguments: str) -> str:
        ran = subprocess.run(
            [sys.executable, "-m", "art_core", *arguments],
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return ran.stdout

    page = (ROOT / "docs" / "writing-a-plugin.md").read_text(encoding="utf-8")
    assert f"```\n{art('plugins', 'show', 'mine')}```" in page
    rows = {row["name"]: row for row in json.loads(art("plugins", "--json"))}
    assert rows["bell"]["hooks"] == ["art_checkpoint_published"]
    for name, project in (("bell", "art-bell"), ("mine", "art-engine-mine")):
        declared = tomllib.loads((projects / project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert (rows[name]["status"], rows[name]["version"]) == ("active", declared["version"])
    only_bell = subprocess.run(
        [sys.executable, "-c", ONE_ROW], env=env, capture_output=True, text=True, timeout=120, check=True
    )
    assert only_bell.stdout in page


ONE_ROW = """
from art.command_line import print_plugins
from art_core import installed_plugins
print_plugins([info for info in installed_plugins().infos if info.name == "bell"])
"""
