"""Trying a function again when it raises. Works the same for functions and for coroutine functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from tenacity import RetryCallState

P = ParamSpec("P")
R = TypeVar("R")


def retry(
    max_attempts: int = 3,
    delay: float = 0.25,
    backoff_factor: float = 2,
    exceptions: tuple[type[BaseException], ...] = (Exception,),
    on_retry: Callable[[BaseException, int], object] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that it is called up to `max_attempts` times while it raises one of `exceptions`.

    The first wait is `delay` seconds, each later one `backoff_factor` times the one before. `on_retry(error, attempt)`
    is called before each wait with the attempt that failed, counted from 1. The last error is raised as it is.
    """
    if callable(max_attempts):
        raise TypeError("write @art.retry() with parentheses")
    if max_attempts < 1:
        raise ValueError(f"max_attempts must be at least 1, not {max_attempts}")
    from tenacity import retry as tenacity_retry
    from tenacity import retry_if_exception_type, stop_after_attempt

    def wait(state: RetryCallState) -> float:
        return delay * backoff_factor ** (state.attempt_number - 1)

    def before_sleep(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        if on_retry is not None and error is not None:
            on_retry(error, state.attempt_number)

    return tenacity_retry(
        stop=stop_after_attempt(max_attempts),
        wait=wait,
        retry=retry_if_exception_type(exceptions),
        before_sleep=before_sleep,
        reraise=True,
    )
