"""What a person sees of a job, by a clock that the test sets."""

import io
import threading
import time

import pytest

from raymerge.runtime.events import KindState, Snapshot
from raymerge.runtime.progress import Pace, Progress, clock_text, counts_text, kind_text


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def merge(done: int, failed: int = 0, total: int = 200, running: int = 2, starting: int = 0) -> KindState:
    return KindState("merge", done, failed, total, running, 2, starting)


def model(done: int, total: int = 5, running: int = 1) -> KindState:
    return KindState("model", done, 0, total, running, 1, 0)


@pytest.mark.parametrize(("seconds", "text"), [(4.6, "0:05"), (754, "12:34"), (3723, "1:02:03"), (59.6, "1:00")])
def test_times_read_like_a_clock(seconds, text):
    assert clock_text(seconds) == text


def test_a_kind_in_words():
    assert kind_text(model(3)) == "model 3/5, 1 of 1 workers busy"
    assert kind_text(merge(3, 2, 9, 1, 1)) == "merge 5/9 (2 failed), 1 of 2 workers busy, 1 starting"


def test_rate_and_time_left_come_from_what_was_settled():
    pace = Pace()
    for second in range(11):
        pace.note(Snapshot((merge(2 * second),)), second)
    assert counts_text(Snapshot((merge(20),)), pace, 10) == "20/200 10 %, 2.0/s, 1:30 left"
    assert counts_text(Snapshot((merge(18, 2),)), pace, 10) == "20/200 10 %, 2.0/s, 1:30 left, 2 failed"


def test_the_slowest_kind_decides_and_an_unknown_one_makes_it_a_lower_bound():
    pace = Pace()
    pace.note(Snapshot((merge(0), model(0))), 0)
    pace.note(Snapshot((merge(100), model(0))), 10)
    assert counts_text(Snapshot((merge(100), model(0))), pace, 10) == "100/205 48 %, 10.0/s, over 0:10 left"
    pace.note(Snapshot((merge(150), model(1))), 60)
    assert counts_text(Snapshot((merge(150), model(1))), pace, 60) == "151/205 73 %, 2.5/s, 4:00 left"


def test_waiting_for_a_worker_is_not_counted_as_slow_work():
    pace = Pace()
    for second in range(31):
        pace.note(Snapshot((merge(0, running=0),)), second)
    for second in range(31, 36):
        pace.note(Snapshot((merge(second - 30),)), second)
    assert pace.rate("merge", 35) == pytest.approx(1.0)


def test_only_the_last_minute_counts():
    pace = Pace()
    pace.note(Snapshot((merge(0),)), 0)
    pace.note(Snapshot((merge(100),)), 1)
    for second in range(2, 200):
        pace.note(Snapshot((merge(100 + second // 10),)), second)
    assert pace.rate("merge", 199) == pytest.approx(0.1, rel=0.2)


def test_nothing_known_is_nothing_claimed():
    assert counts_text(Snapshot((merge(0),)), Pace(), 5) == "0/200 0 %"
    assert counts_text(Snapshot(()), Pace(), 5) == "0/0 0 %"


def test_a_job_log_gets_a_line_every_few_seconds_and_one_at_the_end():
    clock, stream = Clock(), io.StringIO()
    with Progress("merging", stream=stream, every_s=5, clock=clock) as progress:
        for second in range(13):
            clock.now = 100 + second
            progress.update(Snapshot((merge(second),)))
        progress.say("worker merge-0 lost: killed")
        progress.update(Snapshot((merge(12, total=300),)))
    assert stream.getvalue().splitlines() == [
        "merging: 5/200 2 %, 1.0/s, 3:15 left, 0:05 elapsed; merge 5/200, 2 of 2 workers busy",
        "merging: 10/200 5 %, 1.0/s, 3:10 left, 0:10 elapsed; merge 10/200, 2 of 2 workers busy",
        "merging: worker merge-0 lost: killed",
        "merging: 12/300 4 %, 1.0/s, 4:48 left, 0:12 elapsed; merge 12/300, 2 of 2 workers busy; finished",
    ]


def test_an_error_ends_with_stopped():
    stream = io.StringIO()
    progress = Progress("merging", stream=stream, clock=Clock())

    def break_off() -> None:
        with progress:
            progress.update(Snapshot((merge(1),)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert stream.getvalue().endswith("; stopped\n")


def test_a_quiet_one_says_nothing():
    stream = io.StringIO()
    with Progress("x", stream=stream, quiet=True) as progress:
        progress.say("hello")
        progress.update(Snapshot((merge(1),)))
    assert stream.getvalue() == ""


def test_the_bar_fits_eighty_columns_and_leaves_no_markup_to_chance():
    from rich.console import Console

    clock, stream = Clock(), io.StringIO()
    progress = Progress("merging sparse_moe_k5 and evaluating it", stream=stream, clock=clock)
    progress.update(Snapshot((merge(0), model(0))))
    clock.now += 10
    progress.update(Snapshot((merge(40, 2), model(1))))
    console = Console(file=stream, width=80, force_terminal=False)
    stream.truncate(0), stream.seek(0)
    console.print(progress._bar(console))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "43/205 20 %, 4.3/s, 0:40 left, 2 failed" in lines[0]
    assert "━" in lines[0]
    assert [line.strip() for line in lines[1:]] == [
        "merge 42/200 (2 failed), 2 of 2 workers busy", "model 1/5, 1 of 1 workers busy", "0:10 elapsed",
    ]  # fmt: skip


def test_a_terminal_gets_the_bar_and_lines_above_it():
    stream = Terminal()
    with Progress("merging", stream=stream) as progress:
        progress.update(Snapshot((merge(50),)))
        progress.say("worker merge-0 lost: [killed]")
    text = stream.getvalue()
    assert "worker merge-0 lost: [killed]" in text
    assert "50/200 25 %" in text


WORKING = Snapshot((model(1),), ("train/a", "train/b"))


def test_lines_of_the_items_being_worked_on_stand_below_the_bar():
    from rich.console import Console

    stream, asked = io.StringIO(), []

    def watch(ids):
        asked.append(ids)
        return [f"adapter_{n}: step 1/2" + " and more" * 20 for n in range(11)]

    progress = Progress("training", stream=stream, watch=watch)
    progress.look()
    assert asked == []  # nothing is being worked on
    progress.update(WORKING)
    progress.look()
    assert asked == [("train/a", "train/b")]
    console = Console(file=stream, width=80, force_terminal=False)
    stream.truncate(0), stream.seek(0)
    console.print(progress._bar(console))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split(":")[0].strip() for line in lines[-9:]] == [*(f"adapter_{n}" for n in range(8)), "and 3 more"]


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_lines_are_shown_while_an_item_blocks_this_thread(kind):
    stream, line, deadline = kind(), "adapter_0: step 1/2", time.monotonic() + 30
    with Progress("training", stream=stream, watch=lambda ids: [line]) as progress:
        progress.update(WORKING)
        while line not in stream.getvalue():
            assert time.monotonic() < deadline
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_a_quiet_one_looks_at_nothing():
    with Progress("x", stream=io.StringIO(), quiet=True, watch=pytest.fail) as progress:
        progress.update(WORKING)
        assert not [thread for thread in threading.enumerate() if thread.name == "progress"]
