"""Whoever reports is never kept waiting, and what a tracker does wrong costs only its own reports."""

import asyncio
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from art_core import PluginRegistry, announce, hookimpl
from art_tracker_kit import Reporter, TrackerBehind, reports_to


def model(name="agent"):
    return SimpleNamespace(name=name, project="shop", entity=None, base_path=".art")


class Told:
    def __init__(self, name):
        self.name, self.heard, self.closed = name, [], False

    def close(self):
        self.closed = True


class Opened(list):
    def __call__(self, model):
        self.append(Told(model.name))
        return self[-1]


def test_what_is_told_reaches_the_models_run_in_order_and_closing_sends_the_rest():
    opened = Opened()
    reporter = Reporter("test", opened)
    for number in range(50):
        name = f"agent-{number % 2}"
        reporter.tell(model(name), f"report {number}", lambda run, n=number: run.heard.append(n))
    reporter.close()
    assert sorted((run.name, run.heard, run.closed) for run in opened) == [
        ("agent-0", list(range(0, 50, 2)), True),
        ("agent-1", list(range(1, 50, 2)), True),
    ]
    with pytest.raises(TrackerBehind, match="it was closed"):
        reporter.tell(model(), "a late report", lambda run: None)


def test_what_raises_is_said_and_what_comes_after_is_told(caplog):
    opened = Opened()
    reporter = Reporter("test", opened)

    def fail(run):
        raise OSError("disk full")

    def leave(run):
        sys.exit(1)

    for work in (fail, leave, lambda run: run.heard.append("after")):
        reporter.tell(model(), "the metrics of step 3", work)
    assert reporter.flush()
    assert opened[0].heard == ["after"]
    reporter.close()
    assert "test: the metrics of step 3 of shop/agent failed: OSError: disk full" in caplog.text
    assert "SystemExit" in caplog.text
    assert "2 reports were lost" in caplog.text


def test_a_tracker_that_hangs_refuses_what_is_new_and_loses_nothing_of_what_it_took(caplog):
    go_on, hanging = threading.Event(), threading.Event()
    opened = Opened()
    reporter = Reporter("test", opened, room=3)

    def hang(run):
        hanging.set()
        go_on.wait(60)

    reporter.tell(model(), "the table of step 1", hang)
    assert hanging.wait(60)
    taken, refused = [], []
    for number in range(5):
        try:
            reporter.tell(model(), f"report {number}", lambda run, n=number: run.heard.append(n))
            taken.append(number)
        except TrackerBehind as behind:
            refused.append(str(behind))
    assert taken == [0, 1, 2]
    assert len(refused) == 2
    assert all("busy with the table of step 1 of shop/agent" in each for each in refused)
    assert not reporter.flush(0.01)
    go_on.set()
    assert reporter.flush()
    assert opened[0].heard == taken
    reporter.close()
    assert "2 reports were lost" in caplog.text


def test_a_run_that_cannot_be_opened_is_tried_again(caplog):
    tries = []

    def open_run(model):
        tries.append(model.name)
        if len(tries) == 1:
            raise ConnectionError("no route")
        return Told(model.name)

    reporter = Reporter("test", open_run, again_after_s=0)
    heard = []
    for number in range(3):
        reporter.tell(model(), f"report {number}", lambda run, n=number: heard.append(n))
    reporter.close()
    assert (heard, len(tries)) == ([1, 2], 2)
    assert "opening the run of shop/agent failed: ConnectionError: no route" in caplog.text


def test_a_run_that_cannot_be_opened_is_not_tried_at_each_report():
    tries = []

    def open_run(model):
        tries.append(model.name)
        raise ConnectionError("no route")

    reporter = Reporter("test", open_run, again_after_s=3600)
    for number in range(20):
        reporter.tell(model(), f"report {number}", lambda run: None)
    reporter.close()
    assert len(tries) == 1


async def test_hooks_of_a_tracker_that_hangs_return_and_the_other_tracker_hears_all():
    go_on = threading.Event()
    reporter = Reporter("stuck", lambda model: go_on.wait(60) and Told(model.name), room=2)
    heard = []

    @hookimpl
    def into_the_queue(model, metrics, step):
        reporter.tell(model, f"the metrics of step {step}", lambda run: None)

    @hookimpl
    def at_once(metrics, step):
        heard.append(step)

    registry = PluginRegistry()
    registry.register(SimpleNamespace(art_api=1, art_log_metrics=into_the_queue), name="stuck")
    registry.register(SimpleNamespace(art_api=1, art_log_metrics=at_once), name="files")

    async def log():
        for step in range(10):
            await announce(registry, "art_log_metrics", model=model(), metrics={"a": 1.0}, step=step, split="train")

    with pytest.warns(RuntimeWarning, match="plugin 'stuck' failed in art_log_metrics: TrackerBehind"):
        await asyncio.wait_for(log(), 60)
    assert heard == list(range(10))
    go_on.set()
    reporter.close()


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["works", "raises"])), max_size=20))
def test_each_report_that_works_is_told_once(reports):
    opened = Opened()
    reporter = Reporter("test", opened)
    for number, (name, fate) in enumerate(reports):
        work = (lambda run, n=number: run.heard.append(n)) if fate == "works" else lambda run: 1 / 0
        reporter.tell(model(name), f"report {number}", work)
    reporter.close()
    heard = {run.name: run.heard for run in opened}
    for name in {name for name, _ in reports}:
        assert heard[name] == [n for n, (whose, fate) in enumerate(reports) if (whose, fate) == (name, "works")]


AT_THE_END = """
import threading, time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from art_tracker_kit import Reporter

class Run:
    def close(self):
        print("closed", flush=True)

reporter = Reporter("test", lambda model: Run(), closing_limit_s={limit})
model = SimpleNamespace(name="agent", project="shop", entity=None, base_path=".art")
for number in range(3):
    reporter.tell(model, f"report {{number}}", lambda run, n=number: (time.sleep({takes}), print(n, flush=True)))
"""


def ended(**settings):
    code = textwrap.dedent(AT_THE_END.format(**settings))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)


@pytest.mark.slow
def test_the_end_of_the_process_waits_for_what_is_queued():
    assert ended(limit=50, takes=0.1).stdout.split() == ["0", "1", "2", "closed"]


def test_the_end_of_the_process_waits_no_longer_than_the_limit_and_says_what_is_lost():
    done = ended(limit=0.2, takes=3600)
    assert done.stdout == ""
    assert "test: 2 reports were lost while this process ran" in done.stderr
    assert "while it was busy with report 0 of shop/agent to the end" in done.stderr


OPENED_AT_THE_END = """
import threading
from types import SimpleNamespace
from art_tracker_kit import Reporter

class Run:
    def close(self):
        print("closed")

def open_run(model):
    threading.main_thread().join()
    from concurrent.futures import ThreadPoolExecutor
    return Run()

model = SimpleNamespace(name="agent", project="shop", entity=None, base_path=".art")
Reporter("test", open_run).tell(model, "a report", lambda run: print("told"))
"""


def test_a_library_that_knows_pools_of_threads_is_imported_as_the_process_ends_too():
    command = [sys.executable, "-c", OPENED_AT_THE_END]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout.split(), done.stderr) == (["told", "closed"], "")


@pytest.mark.parametrize(
    ("named", "reports"), [(None, True), (["other"], False), (["mine", "other"], True), ([], False)]
)
def test_report_metrics_says_who_hears_of_checkpoints(named, reports):
    assert reports_to(SimpleNamespace(**vars(model()), report_metrics=named), "mine") is reports


def test_a_model_that_says_nothing_of_trackers_reports_where_that_is_the_rule():
    assert reports_to(model(), "mine")
    assert not reports_to(model(), "mine", unasked=False)


async def test_the_tracker_of_the_readme_is_one(capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    plugin = ModuleType("printed")
    exec(readme.split("```python\n")[1].split("```")[0], vars(plugin))
    registry = PluginRegistry()
    registry.register(plugin, name="printer")
    await announce(registry, "art_log_metrics", model=model(), metrics={"a": 1.0}, step=3, split="train")
    plugin.reporter.close()
    assert capsys.readouterr().out == "3 {'a': 1.0}\ndone\n"
