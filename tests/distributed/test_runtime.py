"""Reading ahead and SIGTERM."""

import os
import signal
import threading

import pytest

from medclip_jax.distributed import runtime


def test_items_come_in_order_one_ahead_and_errors_at_their_turn():
    started = []

    def make(i):
        started.append(i)
        if i == 3:
            raise ValueError("the fourth")
        return 10 * i

    items, found = runtime.prefetch(make, range(6)), []
    with pytest.raises(ValueError, match="the fourth"):
        for item in items:
            found.append(item)
            assert len(started) <= len(found) + 1
    assert found == [0, 10, 20] and list(runtime.prefetch(make, [])) == []


def test_batches_hold_all_items():
    assert list(runtime.batches(range(5), 2)) == [[0, 1], [2, 3], [4]]


def test_sigterm_sets_the_event_until_the_block_is_left():
    before = signal.getsignal(signal.SIGTERM)
    with runtime.sigterm() as event:
        os.kill(os.getpid(), signal.SIGTERM)
        assert event.wait(5)
    assert signal.getsignal(signal.SIGTERM) is before
    other = threading.Thread(target=lambda: runtime.sigterm().__enter__().set())
    other.start()  # of another thread the handler stays as it is
    other.join()
    assert signal.getsignal(signal.SIGTERM) is before
