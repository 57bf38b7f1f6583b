"""docs/writing-a-plugin.md followed to the letter, by somebody who has only the wheels: its blocks in their order, in a
new environment outside the checkout. Knows how a page says what to do; knows nothing of what plugins are.
"""

from __future__ import annotations

import os
import re
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "writing-a-plugin.md"
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Commands:
    """What is typed into a shell, and the end of what it prints, where the page shows that."""

    text: str
    prints: str | None


@dataclass(frozen=True)
class Written:
    """A file that the reader writes, or finds written by a command."""

    path: str
    text: str


def instructions(page: str) -> Iterator[Commands | Written]:
    """What a page tells its reader to do, in its order.

    Raises ValueError for a block that is none of it: a reader would not know what to do with it either.
    """
    blocks = [(*match["info"].partition(" ")[::2], match["text"]) for match in FENCE.finditer(page)]
    for (language, mark, text), (then, _, shown) in pairwise([*blocks, ("end", "", "")]):
        if mark.startswith("file="):
            yield Written(mark.removeprefix("file="), text)
        elif language == "sh" and not mark:
            yield Commands(text, None if then else shown)
        elif language:
            raise ValueError(f"a block {language!r} {mark!r} says neither what to type nor where to write it: {text}")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_tutorial_can_be_followed_to_the_letter(wheels: Path, environment_for: Any, tmp_path: Path) -> None:
    fresh = environment_for(tmp_path / "environment", wheels)
    venv.create(fresh.folder, with_pip=True)
    folder = tmp_path / "reader"
    folder.mkdir()
    # Ours are not on the index; what they need is, in the versions of `make setup`.
    found = f"{os.environ.get('PIP_FIND_LINKS', '')} {wheels}".strip()
    settings = (f"PIP_FIND_LINKS={found}", f"PIP_CONSTRAINT={ROOT / 'constraints.txt'}")
    followed = list(instructions(PAGE.read_text(encoding="utf-8")))
    for each in followed:
        if isinstance(each, Written):
            file = folder / each.path
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(each.text, encoding="utf-8")
            assert file.read_text(encoding="utf-8") == each.text, f"a command wrote {each.path} otherwise"
            continue
        # In one stream, as a reader sees it.
        shell = ("bash", "-eu", "-c", f"exec 2>&1\n{each.text}")
        ran = fresh.run("env", *settings, *shell, cwd=folder, timeout=600)
        assert ran.returncode == 0, f"{each.text}\n{ran.stdout[-6000:]}"
        if each.prints is not None:
            assert ran.stdout.endswith(each.prints), f"{each.text}\n{ran.stdout[-3000:]}"
    shown = [each for each in followed if isinstance(each, Commands) and each.prints is not None]
    assert len(followed) >= 14
    assert len(shown) >= 6


def test_what_a_page_tells_its_reader_to_do_is_read_in_order() -> None:
    page = """
```sh
art plugins
```

It prints:

```
none
```

```python file=a/b.py
x = 1
```

```sh
pip install a
```
"""
    assert list(instructions(page)) == [
        Commands("art plugins\n", "none\n"),
        Written("a/b.py", "x = 1\n"),
        Commands("pip install a\n", None),
    ]
    with pytest.raises(ValueError, match="neither what to type nor where to write it"):
        list(instructions("```python\nx = 1\n```\n"))
