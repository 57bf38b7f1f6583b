"""The page about hosting a server names the options that there are, with their defaults, and no others."""

from __future__ import annotations

import re
from pathlib import Path

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
