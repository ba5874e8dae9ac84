"""What a caller on an event loop asked for does not outlive him."""

import asyncio
import threading

import pytest

from softprompt.generation import in_thread


def test_what_was_asked_for_comes_back():
    cancelled = []
    assert asyncio.run(in_thread(lambda: [1, 2], cancelled.append)) == [1, 2]
    assert not cancelled


def test_an_error_comes_back():
    with pytest.raises(ZeroDivisionError):
        asyncio.run(in_thread(lambda: [1 // 0], lambda each: None))


def test_a_caller_who_goes_while_it_is_asked():
    begun, go_on, undone, cancelled = threading.Event(), threading.Event(), threading.Event(), []

    def ask():
        begun.set()
        go_on.wait(10)
        return [1, 2]

    def cancel(each):
        cancelled.append(each)
        if each == 2:
            undone.set()

    async def goes_away():
        asking = asyncio.ensure_future(in_thread(ask, cancel))
        await asyncio.to_thread(begun.wait, 10)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert not cancelled
        go_on.set()
        await asyncio.to_thread(undone.wait, 10)

    asyncio.run(goes_away())
    assert cancelled == [1, 2]


def test_a_caller_who_goes_just_before_he_is_told():
    cancelled = []

    async def goes_away():
        loop = asyncio.get_running_loop()

        def ask():
            # In the loop's queue before the end of the thread is.
            loop.call_soon_threadsafe(asking.cancel)
            return [1, 2]

        asking = asyncio.ensure_future(in_thread(ask, cancelled.append))
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(goes_away())
    assert set(cancelled) == {1, 2}
