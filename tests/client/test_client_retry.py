import pytest

import art


def flaky(failures, calls, error=ValueError):
    def attempt(value):
        calls.append(value)
        if len(calls) <= failures:
            raise error(f"attempt {len(calls)}")
        return value * 2

    return attempt


def test_a_function_is_tried_again():
    calls, seen = [], []
    function = art.retry(max_attempts=3, delay=0, on_retry=lambda error, n: seen.append((str(error), n)))(
        flaky(2, calls)
    )
    assert function(21) == 42
    assert calls == [21, 21, 21]
    assert seen == [("attempt 1", 1), ("attempt 2", 2)]


def test_the_last_error_is_raised_as_it_is():
    calls = []
    with pytest.raises(ValueError, match="attempt 3"):
        art.retry(delay=0)(flaky(9, calls))(1)
    assert len(calls) == 3


def test_only_the_named_exceptions_are_tried_again():
    calls = []
    with pytest.raises(KeyError):
        art.retry(delay=0, exceptions=(ValueError,))(flaky(9, calls, KeyError))(1)
    assert len(calls) == 1


async def test_a_coroutine_function_is_tried_again():
    calls = []
    attempt = flaky(1, calls)

    @art.retry(max_attempts=2, delay=0)
    async def function(value):
        """What it does."""
        return attempt(value)

    assert await function(2) == 4
    assert function.__doc__ == "What it does."
    assert function.__name__ == "function"


async def test_the_waits_grow(monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr("asyncio.sleep", sleep)

    @art.retry(max_attempts=4)
    async def function():
        raise ValueError

    with pytest.raises(ValueError):
        await function()
    assert waits == [0.25, 0.5, 1.0]


def test_wrong_use():
    with pytest.raises(TypeError, match="parentheses"):
        art.retry(len)
    with pytest.raises(ValueError, match="at least 1"):
        art.retry(max_attempts=0)
