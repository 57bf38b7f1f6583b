"""A made taskset without end."""

from collections.abc import Iterator
from itertools import count

import verifiers.v1 as vf


class Count(vf.Taskset[vf.Task, vf.TasksetConfig]):
    INFINITE = True

    def load(self) -> Iterator[vf.Task]:
        for number in count():
            yield vf.Task(vf.TaskData(name=f"number {number}", prompt=f"Say {number}."), self.config.task)


__all__ = ["Count"]
