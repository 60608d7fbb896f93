"""Work done ahead in threads."""

import threading

import pytest

from cisformer.runtime.ahead import ahead


@pytest.mark.parametrize("n_threads", [0, 1, 3])
def test_results_come_in_order(n_threads):
    assert list(ahead(lambda x: x * x, range(20), n_threads)) == [x * x for x in range(20)]
    assert list(ahead(lambda x: x, [], n_threads)) == []


def test_no_more_is_taken_than_may_wait():
    taken = []
    results = ahead(lambda x: x, (taken.append(x) or x for x in range(20)), 1, waiting=3)
    next(results)
    assert taken == [0, 1, 2, 3]
    results.close()


def test_several_work_at_once():
    meeting = threading.Barrier(2, timeout=10)
    assert len(list(ahead(lambda _: meeting.wait(), range(2), 2))) == 2


def test_an_error_reaches_who_asks_for_the_result():
    results = ahead(lambda x: 1 // x, [1, 0, 2], 2)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_after_an_error_what_waits_is_not_begun():
    begun, blocked = [], threading.Event()

    def work(x):
        begun.append(x)
        if x == 0:
            raise ValueError("the disk is full")
        blocked.wait(timeout=0.2)

    with pytest.raises(ValueError, match="disk"):
        list(ahead(work, range(100), 1, waiting=50))
    assert len(begun) < 10
