"""Pieces on threads: outcomes in order, errors in their place, nothing left running."""

import contextlib
import threading

import pytest

from fp8jax.checkpoint._ahead import Work, run_ahead


def test_outcomes_come_in_order_after_all_of_their_pieces():
    later = threading.Event()
    done = []

    def slow():
        # Only a thread of its own lets another piece, of the next work, run first.
        assert later.wait(60)
        done.append("slow")
        return 1

    def quick():
        done.append("quick")
        later.set()
        return 2

    works = [Work([slow], lambda: list(done)), Work([quick], lambda: "second")]
    progress = []
    first, second = run_ahead(works, progress.append)
    assert (first, second) == (["quick", "slow"], "second")
    assert progress == [1, 2]


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    monkeypatch.setattr("fp8jax.checkpoint._ahead._cores", lambda: 2)


def test_an_error_comes_in_its_place_and_works_before_it_are_whole():
    def fails():
        raise OSError("disk full")

    works = [Work([lambda: 1] * 5, lambda: "a"), Work([fails], lambda: "b")]
    outcomes = run_ahead(works, lambda nbytes: None)
    assert next(outcomes) == "a"
    with pytest.raises(OSError, match="disk full"):
        next(outcomes)


def test_closed_early_it_leaves_no_piece_running():
    started, go_on = threading.Event(), threading.Event()
    running, ran = [], []

    def piece():
        running.append(1)
        started.set()
        assert go_on.wait(60)
        ran.append(1)
        return 0

    works = [Work([], lambda: "a"), *[Work([piece], lambda: "b")] * 100]
    with contextlib.closing(run_ahead(works, lambda nbytes: None)) as outcomes:
        assert next(outcomes) == "a"
        assert started.wait(60)
        go_on.set()
    assert len(running) == len(ran) < 100
