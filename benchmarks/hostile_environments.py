"""The demo, one step of it, in environments that people really have: works, or says what is wrong.

    python benchmarks/hostile_environments.py                 # every environment, half a minute each
    python benchmarks/hostile_environments.py --only locale

Each run gets an empty home and this environment's variables, limits or working folder, and no other; what was fetched
and made before (weights, environments) is used again. Exits with 1 when a run ended without having trained.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from measuring.machine import machine
from rich.console import Console
from rich.progress import track
from rich.table import Table

from art_engine_kit.checkpoint_folder import MANIFEST
from art_engine_kit.user_folders import cache_dir

DEMO = Path(__file__).parents[1] / "examples" / "customer_replies.py"
LIMIT_S = 300.0
CLOSED = "http://127.0.0.1:9"
NOWHERE = "/no/such/place"
# Names of modules that the demo or what it uses imports, and of folders that it might.
SHADOWS = ("secrets", "logging", "random", "typing", "socket", "tokenizers", "uvicorn", "openai", "json", "test")


@dataclass(frozen=True)
class Surroundings:
    """What is unusual: `env` beside PATH, HOME and the cache's place (an empty value takes one of them away), `shell`
    before the command, `folder` to start in, or `shadowed` for a folder of traps.
    """

    name: str
    env: Mapping[str, str] = field(default_factory=dict)
    shell: str = ""
    folder: Path = DEMO.parent
    shadowed: bool = False


ALL = (
    Surroundings("nothing unusual"),
    Surroundings("files that shadow modules", shadowed=True),
    Surroundings("files that shadow, and PYTHONPATH with an empty entry", {"PYTHONPATH": ":"}, shadowed=True),
    Surroundings("a dead proxy for everything", {"HTTP_PROXY": CLOSED, "HTTPS_PROXY": CLOSED, "all_proxy": CLOSED}),
    Surroundings("a SOCKS proxy", {"ALL_PROXY": "socks5://127.0.0.1:9"}),
    Surroundings("NO_PROXY with a pattern", {"HTTP_PROXY": CLOSED, "NO_PROXY": "*.internal,10.0.0.0/8"}),
    Surroundings("certificates that aren't there", {"SSL_CERT_FILE": NOWHERE, "REQUESTS_CA_BUNDLE": NOWHERE}),
    Surroundings("no HOME, and a user without a name", {"HOME": ""},
                 shell="exec unshare --user --map-user=12345 --map-group=12345"),
    Surroundings("HOME=/dev/null", {"HOME": os.devnull}),
    Surroundings("a TMPDIR that isn't there", {"TMPDIR": NOWHERE}),
    Surroundings("an ASCII locale", {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
                                     "PYTHONIOENCODING": "ascii"}),
    Surroundings("PYTHONOPTIMIZE=2", {"PYTHONOPTIMIZE": "2"}),
    Surroundings("warnings made errors", {"PYTHONWARNINGS": "error"}),
    Surroundings("Python's development mode", {"PYTHONDEVMODE": "1"}),
    Surroundings("no bytecode, no user site", {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONNOUSERSITE": "1"}),
    Surroundings("a terminal of one column", {"TERM": "dumb", "COLUMNS": "1"}),
    Surroundings("64 open files", shell="ulimit -n 64; exec"),
    Surroundings("256 open files", shell="ulimit -n 256; exec"),
    Surroundings("OMP_NUM_THREADS=0", {"OMP_NUM_THREADS": "0"}),
    Surroundings("a GPU asked for that isn't there", {"CUDA_VISIBLE_DEVICES": "7"}),
    Surroundings("umask 777", shell="umask 777; exec"),
    Surroundings("a working folder that can't be written", folder=Path("/proc")),
    Surroundings("no standard input", shell="exec <&-; exec"),
    Surroundings("hub variables that lead nowhere", {"HF_HOME": os.devnull, "HF_ENDPOINT": CLOSED,
                                                     "XDG_CACHE_HOME": os.devnull}),
    Surroundings("keys of other services", {"OPENAI_API_KEY": "", "OPENAI_BASE_URL": CLOSED, "WANDB_MODE": "online"}),
)  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """How one run ended: `trained` when its step was, `said` the last line that it wrote."""

    name: str
    trained: bool
    seconds: float
    said: str


def run(case: Surroundings, scratch: Path) -> Ran:
    """One step of the demo there."""
    home, folder = scratch / "home", case.folder
    home.mkdir()
    if case.shadowed:
        folder = scratch / "traps"
        (folder / "transformers").mkdir(parents=True)
        (folder / "transformers" / "__init__.py").write_text("raise SystemExit('a trap')", encoding="utf-8")
        for name in SHADOWS:
            (folder / f"{name}.py").write_text("raise SystemExit('a trap')", encoding="utf-8")
    usual = {"PATH": os.environ["PATH"], "HOME": str(home), "ART_CACHE_DIR": str(cache_dir())}
    # As `make demo` has it: trackers that happen to be installed would write into the folder that it runs in.
    usual |= {"ART_TRACKIO_MODE": "disabled", "ART_MLFLOW_MODE": "disabled"}
    env = {name: value for name, value in {**usual, **case.env}.items() if value or name not in usual}
    demo = [sys.executable, str(DEMO), "--steps", "1", "--samples", "2", "--path", str(scratch / "run")]
    command = ["bash", "-c", f'{case.shell} "$@"', "bash", *demo] if case.shell else demo
    began = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT_S, check=False
        )
        written, ended = done.stdout, done.returncode == 0
    except subprocess.TimeoutExpired as error:
        written, ended = error.stdout or b"", False
    seconds = time.monotonic() - began
    lines = [line for line in written.decode(errors="replace").splitlines() if line.strip()]
    trained = ended and any((scratch / "run").rglob(f"checkpoints/0001/{MANIFEST}"))
    return Ran(case.name, trained, seconds, "" if trained else (lines or ["nothing"])[-1].strip())


def main() -> int:
    """Run them and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORDS", help="only the environments whose name has these words")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    chosen = [case for case in ALL if arguments.only in case.name]
    if not chosen:
        parser.error(f"no environment's name has {arguments.only!r}: {', '.join(case.name for case in ALL)}")
    console = Console(stderr=arguments.json)
    console.print(machine(), highlight=False)
    found = []
    for case in track(chosen, "running the demo", console=console):
        with TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            found.append(run(case, Path(scratch)))
    if arguments.json:
        print(json.dumps({"runs": [vars(ran) for ran in found]}))
    else:
        table = Table("environment", "trained", "seconds", "last line")
        for ran in found:
            table.add_row(ran.name, "yes" if ran.trained else "NO", f"{ran.seconds:.0f}", ran.said)
        console.print(table)
    return 0 if all(ran.trained for ran in found) else 1


if __name__ == "__main__":
    sys.exit(main())
