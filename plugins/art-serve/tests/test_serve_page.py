"""The page about hosting a server names the options that there are, with their defaults, and no others."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from art_serve.commands import serve_cli

PAGE = (Path(__file__).parents[3] / "docs" / "self-hosting.md").read_text(encoding="utf-8")


def test_the_page_has_every_option_and_no_other() -> None:
    command = typer.main.get_command(serve_cli)
    options = {word for parameter in command.params for word in parameter.opts if word.startswith("--")}
    table = PAGE[PAGE.index("| option |") : PAGE.index("\n\nBeyond loopback")]
    assert set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", table)) == options - {
        "--help",
        "--show-completion",
        "--install-completion",
    }
    for parameter in command.params:
        if isinstance(parameter.default, int | float) and f"`{parameter.opts[0]}`" in table:
            row = next(row for row in table.splitlines() if f"`{parameter.opts[0]}`" in row)
            assert f"{parameter.default:g}" in row, parameter.opts


def test_the_units_of_the_page_start_it_with_options_that_there_are() -> None:
    command = typer.main.get_command(serve_cli)
    options = {word for parameter in command.params for word in parameter.opts}
    for line in PAGE.splitlines():
        if line.startswith(("ExecStart=", "CMD ")):
            assert set(re.findall(r"--[a-z-]+", line)) <= options, line


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here to judge its unit")
def test_systemd_takes_the_unit_of_the_page(tmp_path: Path) -> None:
    (written,) = re.findall(r"```ini\n(.*?)```", PAGE, re.DOTALL)
    unit = tmp_path / "art-serve.service"
    # What it starts and as whom isn't there on a machine of developers.
    unit.write_text(re.sub(r"/opt/art/bin/art\b", sys.executable, written).replace("User=art\n", "User=root\n"))
    judged = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert (judged.returncode, judged.stdout + judged.stderr) == (0, "")
