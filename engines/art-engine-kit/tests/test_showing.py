"""What is waited for, as a person reads it: a live line on a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
import termios
import textwrap
from pathlib import Path

import pytest

from art_engine_kit.showing import Shown, counted
from art_engine_kit.waited_lock import held

WAIT = textwrap.dedent("""
    import time
    from art_engine_kit import showing
    from art_engine_kit.showing import Shown, say

    showing.PLAIN_EVERY_S = 0.2
    with Shown("Fetching the model", total=2e6, unit="B") as shown:
        shown.update(done=1e6, note="from [red]an[/] index\\n")
        time.sleep(1)
        with Shown("Waiting within"):
            time.sleep(1)
    say("a sentence with [brackets]")
""")


@pytest.mark.slow
def test_in_a_log_a_line_comes_now_and_then_and_the_inner_wait_is_what_is_said() -> None:
    done = subprocess.run([sys.executable, "-c", WAIT], capture_output=True, text=True, timeout=60, check=True)
    *lines, sentence = done.stderr.splitlines()
    assert sentence == "a sentence with [brackets]"
    assert "\r" not in done.stderr
    assert "\x1b" not in done.stderr
    assert lines[0].startswith("Fetching the model: 1.0 of 2.0 MB, ")
    assert lines[0].endswith(" | from [red]an[/] index")
    within = [number for number, line in enumerate(lines) if line.startswith("Waiting within: ")]
    assert within == list(range(within[0], within[-1] + 1)), lines
    assert done.stdout == ""


@pytest.mark.slow
def test_on_a_terminal_the_line_is_live_and_goes_away() -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    process = subprocess.Popen([sys.executable, "-c", WAIT], stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    shown = b""
    # A terminal that nobody has open any more says so with an error.
    with contextlib.suppress(OSError):
        while part := os.read(ours, 4096):
            shown += part
    assert process.wait(timeout=60) == 0
    os.close(ours)
    assert b"\x1b[2K" in shown  # a line is written over
    assert b"1.0 of 2.0 MB" in shown
    assert b"from [red]an[/] index" in shown
    assert b"a sentence with [brackets]" in shown


def test_what_takes_no_time_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Shown("A moment", total=3, unit="rows") as shown:
        shown.update(done=3)
    with Shown("Not at all", enabled=False) as shown:
        shown.update(note="x")
    assert capsys.readouterr() == ("", "")


def test_amounts() -> None:
    assert counted(12, 64, "rows") == "12 of 64 rows"
    assert counted(45.2e6, 92.9e6, "B") == "45.2 of 92.9 MB"
    assert counted(182.5e6, 92.9e6, "B") == "92.9 of 92.9 MB"
    assert counted(45.2e6, None, "B") == "45.2 MB"
    assert counted(3, None, "") == "3"


HOLD = "import sys; from filelock import FileLock\nwith FileLock(sys.argv[1]): print('held', flush=True); input()"


def test_a_lock_is_waited_for_and_given_up_in_words(tmp_path: Path) -> None:
    file = tmp_path / "model.lock"
    command = [sys.executable, "-c", HOLD, str(file)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(TimeoutError, match=rf"another process, which makes it, has held {file}.* try again\."),
            held(file, limit_s=0.3, what="makes it"),
        ):
            pytest.fail("it is held by the other")
    finally:
        other.communicate("", timeout=60)
    with held(file, limit_s=0.3, what="makes it"):
        assert file.exists()
