"""The scheduler by events alone: no Ray, no clock, no process."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from raymerge.errors import PoolError
from raymerge.runtime.events import (
    Abandon,
    Event,
    Instruction,
    Item,
    ItemDone,
    ItemFailed,
    ItemsAdded,
    Outcome,
    Say,
    Settle,
    StartWorker,
    Submit,
    WorkerFailed,
    WorkerLost,
    WorkerReady,
)
from raymerge.runtime.scheduler import Scheduler, TransitionError


class Desk:
    """Feeds a scheduler and keeps what it answered, as a pool would see it."""

    def __init__(self, workers: dict[str, int], max_attempts: int = 3) -> None:
        self.scheduler = Scheduler(workers, max_attempts=max_attempts)
        self.starting: list[str] = []
        self.held: dict[str, list[str]] = {}
        self.said: list[str] = []
        self.settled: list[Outcome] = []
        self.dealt: list[tuple[str, str]] = []
        self.abandoned: list[str] = []

    def tell(self, *events: Event) -> None:
        for event in events:
            for instruction in self.scheduler.handle(event):
                self._note(instruction)
            self.scheduler.check()

    def _note(self, instruction: Instruction) -> None:
        match instruction:
            case StartWorker(worker):
                self.starting.append(worker)
            case Submit(worker, item):
                self.held[worker].append(item.id)
                self.dealt.append((worker, item.id))
            case Settle(outcome):
                self.settled.append(outcome)
            case Say(text):
                self.said.append(text)
            case Abandon(kind):
                self.abandoned.append(kind)

    def add(self, *items: Item | str) -> None:
        self.tell(ItemsAdded(tuple(Item(i, "m", "go") if isinstance(i, str) else i for i in items)))

    def ready(self, worker: str) -> None:
        self.starting.remove(worker)
        self.held[worker] = []
        self.tell(WorkerReady(worker))

    def done(self, worker: str) -> str:
        id = self.held[worker].pop(0)
        self.tell(ItemDone(worker, id))
        return id

    def lost(self, worker: str, began: bool = True) -> None:
        if worker in self.starting:
            self.starting.remove(worker)
        self.held.pop(worker, None)
        self.tell(WorkerLost(worker, "killed", began))

    def errors(self) -> dict[str, str]:
        return {o.item_id: o.error for o in self.scheduler.outcomes() if o.error is not None}


def after(id: str, *others: str, kind: str = "m") -> Item:
    return Item(id, kind, "go", after=others)


def test_workers_start_when_their_kind_has_work_and_no_more_than_items():
    desk = Desk({"m": 3, "g": 2})
    desk.add("a", "b")
    assert desk.starting == ["m-0", "m-1"]
    desk.add(Item("x", "g", "go"))
    assert desk.starting == ["m-0", "m-1", "g-0"]


def test_items_are_dealt_in_order_and_two_to_a_worker_while_there_is_plenty():
    desk = Desk({"m": 2})
    desk.add(*"abcdefg")
    desk.ready("m-0")
    assert desk.held == {"m-0": ["a", "b"]}
    desk.ready("m-1")
    assert desk.held == {"m-0": ["a", "b"], "m-1": ["c", "d"]}
    desk.done("m-1")
    assert desk.held == {"m-0": ["a", "b"], "m-1": ["d", "e"]}


def test_the_last_items_go_to_idle_workers_only():
    desk = Desk({"m": 2})
    desk.add(*"abc")
    desk.ready("m-0")
    assert desk.held == {"m-0": ["a"]}  # b and c are enough for a worker that is still starting, and for this one later
    desk.ready("m-1")
    assert desk.held == {"m-0": ["a"], "m-1": ["b"]}


def test_an_item_alone_has_nothing_behind_it():
    desk = Desk({"m": 1})
    desk.add(Item("long", "m", "go", alone=True), *"abcd")
    desk.ready("m-0")
    assert desk.held == {"m-0": ["long"]}
    desk.done("m-0")
    assert desk.held == {"m-0": ["a", "b"]}


def test_an_item_waits_until_all_it_needs_are_settled_even_by_failing():
    desk = Desk({"m": 1})
    desk.add(after("c", "a", "b"), "a", "b")
    desk.ready("m-0")
    assert desk.dealt == [("m-0", "a")]
    desk.done("m-0")
    desk.held["m-0"].remove("b")
    desk.tell(ItemFailed("m-0", "b", "b: broken"))
    assert desk.held["m-0"] == ["c"]
    desk.done("m-0")
    assert desk.scheduler.finished
    assert [o.item_id for o in desk.scheduler.outcomes()] == ["c", "a", "b"]
    assert desk.errors() == {"b": "b: broken"}


def test_one_kind_never_waits_for_another():
    desk = Desk({"m": 1, "g": 1})
    desk.add("a", "b", "c", Item("x", "g", "go"))
    desk.ready("g-0")
    assert desk.held["g-0"] == ["x"]


def test_items_of_a_lost_worker_come_first_and_only_the_head_is_charged():
    desk = Desk({"m": 2})
    desk.add(*"abcdefgh")
    desk.ready("m-0")
    desk.ready("m-1")
    assert desk.held == {"m-0": ["a", "b"], "m-1": ["c", "d"]}
    desk.lost("m-0")
    assert desk.starting == ["m-2"]
    assert "m-2 takes the place of m-0" in " ".join(desk.said)
    desk.done("m-1")
    assert desk.held["m-1"] == ["d"], "nobody overtakes the charged item, and it is not queued behind another"
    desk.done("m-1")
    assert desk.held["m-1"] == ["a"], "the charged item is alone"
    desk.ready("m-2")
    assert desk.held["m-2"] == ["b"], "the one behind it is not charged, but in doubt"
    desk.done("m-2")
    assert desk.held["m-2"] == ["e", "f"]
    desk.lost("m-1")
    desk.ready("m-3")
    assert desk.held["m-3"] == ["a"]
    desk.done("m-3")
    attempts = {o.item_id: o.attempts for o in desk.scheduler.outcomes()}
    assert attempts == {"a": 3, "b": 1, "c": 1, "d": 1}


def test_a_killer_behind_an_item_whose_answer_was_lost_is_found_and_nobody_else_is_given_up():
    desk = Desk({"m": 1}, max_attempts=2)
    desk.add("innocent", "killer", *"abcd")
    desk.ready("m-0")
    assert desk.held["m-0"] == ["innocent", "killer"]
    desk.lost("m-0")  # of the second item; the first one's answer did not arrive
    while not desk.scheduler.finished:
        if desk.starting:
            desk.ready(desk.starting[0])
        worker = next(iter(desk.held))
        if desk.held[worker][0] == "killer":
            desk.lost(worker)
        else:
            desk.done(worker)
    assert {o.item_id: o.attempts for o in desk.settled if o.attempts > 1} == {"innocent": 2, "killer": 2}
    assert list(desk.errors()) == ["killer"]


def test_with_a_single_attempt_nothing_is_queued_behind_another():
    desk = Desk({"m": 1}, max_attempts=1)
    desk.add(*"abcd")
    desk.ready("m-0")
    assert desk.held["m-0"] == ["a"]
    desk.lost("m-0")
    assert list(desk.errors()) == ["a"]


def test_an_item_that_keeps_killing_is_given_up_by_name_and_the_others_finish():
    desk = Desk({"m": 1}, max_attempts=3)
    desk.add("killer", *"abc")
    while not desk.scheduler.finished:
        if desk.starting:
            desk.ready(desk.starting[0])
        worker = next(iter(desk.held))
        if desk.held[worker][0] == "killer":
            desk.lost(worker)
        else:
            desk.done(worker)
    assert list(desk.errors()) == ["killer"]
    assert desk.errors()["killer"].startswith("killer: given up, its worker died at each of 3 attempts")
    assert [o.attempts for o in desk.scheduler.outcomes()] == [3, 1, 1, 1]


def test_a_worker_that_dies_idle_charges_nobody():
    desk = Desk({"m": 1})
    desk.add(*"abc")
    desk.ready("m-0")
    desk.lost("m-0", began=False)
    desk.ready("m-1")
    assert desk.held["m-1"] == ["a", "b"]
    desk.done("m-1")
    assert desk.settled[0].attempts == 1


def test_a_worker_that_cannot_be_had_is_done_without_and_the_last_one_ends_the_job():
    desk = Desk({"m": 2})
    desk.add(*"abc")
    desk.tell(WorkerFailed("m-0", "not up\nmore"))
    assert not desk.abandoned
    assert desk.said == ["worker m-0 cannot be had: not up; 1 of kind m left"]
    desk.tell(WorkerFailed("m-1", "not up"))
    assert desk.abandoned == ["m"]


def test_a_worker_that_always_dies_at_start_is_not_replaced_for_ever():
    desk = Desk({"m": 2}, max_attempts=2)
    desk.add(*"abc")
    losses = 0
    while not desk.abandoned:
        desk.lost(desk.starting[0])
        losses += 1
        assert losses < 20
    assert desk.abandoned == ["m"]


def test_items_added_on_the_way_may_wait_for_settled_ones():
    desk = Desk({"m": 1})
    desk.add("a")
    desk.ready("m-0")
    desk.done("m-0")
    assert desk.scheduler.finished
    desk.add(after("b", "a"))
    assert not desk.scheduler.finished
    assert desk.held["m-0"] == ["b"]


@pytest.mark.parametrize(
    ("items", "says"),
    [
        ([Item("a", "m", "go"), Item("a", "m", "go")], "item a: there is one of this name already"),
        ([Item("a", "q", "go")], "item a: no worker kind 'q'; there are m"),
        ([after("a", "z")], "item a: waits for z, which nobody has added"),
        ([after("a", "b"), after("b", "a"), after("c")], "item a: waits in a circle with 1 others"),
        ([after("a", "a")], "item a: waits in a circle"),
    ],
)
def test_items_that_could_never_run_are_refused_and_nothing_of_their_batch_is_kept(items: Sequence[Item], says: str):
    desk = Desk({"m": 1})
    with pytest.raises(PoolError, match=says):
        desk.tell(ItemsAdded(tuple(items)))
    assert desk.scheduler.finished
    assert desk.scheduler.snapshot().total == 0


@pytest.mark.parametrize(
    "event",
    [
        WorkerReady("m-9"),
        WorkerReady("m-0"),
        WorkerLost("m-9", "killed"),
        WorkerFailed("m-0", "slow"),
        ItemDone("m-0", "c"),
        ItemFailed("m-9", "a", "broken"),
    ],
)
def test_an_impossible_event_is_refused_with_the_history(event: Event):
    desk = Desk({"m": 1})
    desk.add(*"abcd")
    desk.ready("m-0")
    with pytest.raises(TransitionError) as caught:
        desk.tell(event)
    text = str(pickle.loads(pickle.dumps(caught.value)))
    assert "ItemsAdded(4: a, b, c, ...)" in text
    assert "WorkerReady(worker='m-0')" in text
    assert "Submit" in text
    assert repr(event) in text


def test_the_snapshot_counts_items_and_workers():
    desk = Desk({"m": 2, "g": 1})
    desk.add(*"abcd", Item("x", "g", "go"))
    desk.ready("m-0")
    desk.done("m-0")
    desk.held["m-0"].clear()
    desk.tell(ItemFailed("m-0", "b", "broken"))
    state = desk.scheduler.snapshot()
    assert (state.done, state.failed, state.total) == (1, 1, 5)
    m, g = state.kinds
    assert (m.kind, m.done, m.failed, m.total, m.running, m.workers, m.starting) == ("m", 1, 1, 4, 1, 1, 1)
    assert (g.kind, g.workers, g.starting, g.running) == ("g", 0, 1, 0)


@st.composite
def plans(draw: st.DrawFn) -> list[Item]:
    """Items of two kinds; each may wait for earlier ones, some want to be alone."""
    items: list[Item] = []
    for i in range(draw(st.integers(1, 12))):
        earlier = [item.id for item in items]
        needs = draw(st.sets(st.sampled_from(earlier), max_size=3)) if earlier else set()
        alone = draw(st.integers(0, 5)) == 0
        items.append(Item(f"i{i:02d}", draw(st.sampled_from("mg")), "go", after=frozenset(needs), alone=alone))
    return items


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order: the scheduler's own invariants, and what a pool must be able to rely on.

    Some items are killers: their worker dies whenever they are at its head. Innocent workers die as well, but while
    they are idle or starting, so that nobody but killers may ever be charged.
    """

    @initialize(
        items=plans(), killers=st.sets(st.integers(0, 11), max_size=3), m=st.integers(1, 3), g=st.integers(1, 2)
    )
    def begin(self, items: list[Item], killers: set[int], m: int, g: int) -> None:
        self.desk = Desk({"m": m, "g": g}, max_attempts=2)
        self.killers = {f"i{i:02d}" for i in killers}
        self.needs = {item.id: set(item.after) for item in items}
        self.alone = {item.id for item in items if item.alone}
        self.deaths: dict[str, int] = {}
        self.seen = 0
        self.added = 0
        self.desk.tell(ItemsAdded(tuple(items)))

    @rule(data=st.data())
    @precondition(lambda self: self.desk.starting)
    def comes_up(self, data: st.DataObject) -> None:
        self.desk.ready(data.draw(st.sampled_from(self.desk.starting)))

    @rule(data=st.data())
    @precondition(lambda self: any(self.desk.held.values()))
    def works(self, data: st.DataObject) -> None:
        self.work(data.draw(st.sampled_from([w for w, held in self.desk.held.items() if held])))

    @rule(data=st.data())
    @precondition(lambda self: len(self.desk.held) > 1)
    def dies_before_it_begins(self, data: st.DataObject) -> None:
        self.desk.lost(data.draw(st.sampled_from(sorted(self.desk.held))), began=False)

    @rule()
    @precondition(lambda self: self.added < 3 and not self.desk.abandoned)
    def more_is_planned(self) -> None:
        id, needed = f"late{self.added}", sorted(self.needs)[0]
        self.added += 1
        self.needs[id] = {needed}
        self.desk.add(after(id, needed))

    @rule()
    def is_looked_at(self) -> None:
        state = self.desk.scheduler.snapshot()
        assert state.done + state.failed == len(self.desk.settled)
        assert state.total == len(self.needs)
        assert sum(kind.starting for kind in state.kinds) == len(self.desk.starting)

    def work(self, worker: str) -> None:
        head = self.desk.held[worker][0]
        if head in self.killers:
            self.deaths[head] = self.deaths.get(head, 0) + 1
            self.desk.lost(worker)
        elif head.endswith("5"):
            self.desk.held[worker].pop(0)
            self.desk.tell(ItemFailed(worker, head, f"{head}: broken"))
        else:
            self.desk.done(worker)

    @invariant()
    def nothing_is_submitted_too_early_or_settled_twice(self) -> None:
        settled = [outcome.item_id for outcome in self.desk.settled]
        assert len(settled) == len(set(settled))
        for _, id in self.desk.dealt[self.seen :]:
            assert self.needs[id] <= set(settled)
        self.seen = len(self.desk.dealt)
        for held in self.desk.held.values():
            assert len(held) <= 2
            if any(id in self.alone or id in self.deaths for id in held):
                assert len(held) == 1
        assert all(count <= 2 for count in self.deaths.values())

    def teardown(self) -> None:
        """From wherever it is, the job comes to its end, unless too many workers died for nothing."""
        if not hasattr(self, "desk"):
            return
        steps = 0
        while not self.desk.scheduler.finished and not self.desk.abandoned:
            busy = [worker for worker, held in self.desk.held.items() if held]
            if self.desk.starting:
                self.desk.ready(self.desk.starting[0])
            else:
                assert busy, "nothing happens, and the job is not finished"
                self.work(busy[0])
            steps += 1
            assert steps < 500
        if self.desk.abandoned:
            return
        dealt_killers = self.killers & set(self.needs)
        for outcome in self.desk.scheduler.outcomes():
            if outcome.item_id in dealt_killers:
                assert outcome.error is not None
                assert "given up" in outcome.error
                assert outcome.attempts == 2
            else:
                assert outcome.attempts == 1, "an innocent was charged"
                assert (outcome.error is None) == (not outcome.item_id.endswith("5"))
        assert {o.item_id for o in self.desk.settled} == set(self.needs)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.integers(1, 4))
def test_first_deals_follow_the_order_of_the_plan(draws: list[int], workers: int):
    """Without losses, items are dealt in exactly the order in which they were added."""
    desk = Desk({"m": workers})
    ids = [f"{i:02d}" for i in range(len(draws))]
    desk.add(*ids)
    for choice in draws * 3:
        if desk.starting and choice == 0:
            desk.ready(desk.starting[0])
        busy = [worker for worker, held in desk.held.items() if held]
        if busy:
            desk.done(busy[choice % len(busy)])
    assert [id for _, id in desk.dealt] == ids[: len(desk.dealt)]


def test_deaths_without_blame_count_only_in_a_row():
    desk = Desk({"m": 1}, max_attempts=3)
    desk.add(*"abcdefgh")
    while not desk.scheduler.finished:
        desk.lost(desk.starting[0])
        desk.ready(desk.starting[0])
        worker = next(iter(desk.held))
        desk.done(worker)
        desk.done(worker)
        if not desk.scheduler.finished:
            desk.lost(worker, began=False)
    assert not desk.abandoned
