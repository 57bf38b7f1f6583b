"""A server's options, asked of its own parser in another interpreter and written down as a module."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from art_engine_kit.server_arguments import ServerArguments
from art_engine_kit.server_options import module_of, options_of

PARSER = """
import argparse
import os
import beside


def parser():
    made = argparse.ArgumentParser()
    made.add_argument("model")
    made.add_argument("--max-len", "--length", "-m", type=int)
    made.add_argument("--names", nargs="*")
    made.add_argument("--eager", action="store_true")
    made.add_argument("--cache", action=argparse.BooleanOptionalAction)
    if os.environ.get("MORE"):
        made.add_argument("--more")
    print("parsers talk")
    return made
"""


def test_options_are_read_written_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "its_parser.py"
    file.write_text(PARSER)
    (tmp_path / "beside.py").write_text("")
    found = options_of(sys.executable, file, {"MORE": "1"})
    assert found == ServerArguments(
        values=frozenset({"max_len", "length", "more"}),
        lists=frozenset({"names"}),
        flags=frozenset({"eager"}),
        switches=frozenset({"cache"}),
    )
    namespace: dict[str, object] = {}
    exec(module_of(found), namespace)
    assert namespace["ARGUMENTS"] == found


def test_a_parser_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    file = tmp_path / "its_parser.py"
    file.write_text("import no_such_server")
    with pytest.raises(RuntimeError, match="no_such_server"):
        options_of(sys.executable, file)
