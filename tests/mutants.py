"""How many small faults in the code of publication and leases a fast test notices: `make mutants`.

Each module is changed in one place at a time, in a copy of the tree, by cosmic-ray, and its tests are run. Knows which
tests are whose; it is a measurement, and no part of `make test`.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
WORK: Final = ROOT / "build" / "mutants"
#: How long the tests of one mutant may take, in seconds. One that hangs is noticed.
LIMIT_S: Final = 120.0
#: Their tests that need neither weights nor servers, the nearest first.
MODULES: Final = {
    "art_core/publication.py": ["tests/core/test_publish.py"],
    "art_core/steps.py": ["tests/core/test_steps.py", "tests/core/test_publish.py"],
    "engines/art-engine-kit/src/art_engine_kit/served_steps.py": [
        *("engines/art-engine-kit/tests/test_served_steps.py", "tests/core/test_publish.py"),
    ],
    "art/pipeline_trainer/step_leases.py": [
        *("tests/pipeline/test_step_leases.py", "tests/pipeline/test_pipeline_trainer.py", "-k", "lease"),
    ],
}
PLUGINS: Final = ("pytest_asyncio.plugin", "pytest_timeout", "xdist.plugin")
# No faults: types are not evaluated, and a star in a signature is no product.
NO_FAULTS: Final = ("core/ReplaceBinaryOperator_(BitOr|Mul|Pow)_.*", "core/RemoveDecorator")
CONFIG: Final = """\
[cosmic-ray]
module-path = "{module}"
timeout = {limit}
excluded-modules = []
test-command = "{python} -m pytest -q -x {plugins} -p no:cacheprovider -m 'not slow' {tests}"

[cosmic-ray.distributor]
name = "local"

[cosmic-ray.filters.operators-filter]
exclude-operators = [{excluded}]
"""
# That a test fails is all there is to know; hypothesis takes a minute to find the shortest way there.
NO_SHRINKING: Final = """

from hypothesis import Phase

settings.register_profile("mutants", settings.default, phases=(Phase.generate,), derandomize=True, database=None)
settings.load_profile("mutants")
"""


@dataclass(frozen=True)
class Found:
    """What became of a module's mutants: how many were noticed, and the diffs of those that weren't."""

    module: str
    noticed: int
    survivors: list[str]


def measured(module: str, tools: Path) -> Found:
    """Change a copy of the module in every place, one at a time."""
    tree = WORK / Path(module).stem
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=60)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    config = CONFIG.format(
        module=module,
        limit=LIMIT_S,
        python=sys.executable,
        tests=" ".join(MODULES[module]),
        plugins=" ".join(f"-p {plugin}" for plugin in PLUGINS),
        excluded=", ".join(f'"{operator}"' for operator in NO_FAULTS),
    )
    (tree / "mutants.toml").write_text(config, encoding="utf-8")
    with (tree / "conftest.py").open("a", encoding="utf-8") as conftest:
        conftest.write(NO_SHRINKING)
    # What pytest would load of itself takes five times as long as the tests.
    environment = {
        **os.environ,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join((str(tree), str(tree / "engines/art-engine-kit/src"))),
    }
    for command in (
        ["cosmic-ray", "init", "mutants.toml", "session.sqlite"],
        ["cr-filter-operators", "session.sqlite", "mutants.toml"],
        ["cosmic-ray", "baseline", "mutants.toml"],
        ["cosmic-ray", "exec", "mutants.toml", "session.sqlite"],
    ):
        subprocess.run([str(tools / command[0]), *command[1:]], cwd=tree, env=environment, check=True)
    with sqlite3.connect(tree / "session.sqlite") as session:
        outcomes = session.execute("SELECT test_outcome, diff FROM work_results WHERE worker_outcome = 'NORMAL'")
        rows = outcomes.fetchall()
    survivors = [str(diff) for outcome, diff in rows if outcome == "SURVIVED"]
    return Found(module, len(rows) - len(survivors), survivors)


def main(tools: Path) -> None:
    """Measure every module, two at a time, and print the shares and the survivors."""
    shutil.rmtree(WORK, ignore_errors=True)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda module: measured(module, tools), MODULES))
    for each in found:
        for diff in each.survivors:
            print(diff.strip(), end="\n\n")
    for each in found:
        total = each.noticed + len(each.survivors)
        print(f"{each.module}: {each.noticed} of {total} mutants are noticed, {100 * each.noticed / total:.0f} %")
    noticed, survivors = sum(each.noticed for each in found), sum(len(each.survivors) for each in found)
    print(f"all: {noticed} of {noticed + survivors}, {100 * noticed / (noticed + survivors):.0f} %")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
