"""Two checkpoints in turn: whatever is killed or torn, the newest whole one counts."""

from hypothesis import given
from hypothesis import strategies as st

from raymerge.manifest import invalidate
from raymerge.runtime.training_checkpoints import FOLDERS, STATE, Checkpoints


def test_nothing_there_is_none(tmp_path):
    assert Checkpoints(str(tmp_path), "k").newest() is None


@given(written=st.integers(1, 6), harm=st.sampled_from(["unfinished", "torn", "other bytes", "gone", "other key"]))
def test_the_newest_whole_one_of_the_right_key_counts(tmp_path_factory, written, harm):
    folder = tmp_path_factory.mktemp("item")
    checkpoints = Checkpoints(str(folder), "k")
    for number in range(written):
        checkpoints.write(b"state %d" % number, {"steps": number})
    found = Checkpoints(str(folder), "k").newest()
    assert (found.number, found.state, found.note) == (written - 1, b"state %d" % (written - 1), {"steps": written - 1})
    last = folder / FOLDERS[(written - 1) % 2]
    if harm == "unfinished":
        invalidate(str(last))
    elif harm == "torn":
        (last / STATE).write_bytes(b"st")
    elif harm == "other bytes":
        (last / STATE).write_bytes(b"STATE %d" % (written - 1))
    elif harm == "gone":
        (last / STATE).unlink()
    else:
        assert Checkpoints(str(folder), "another").newest() is None
        return
    again = Checkpoints(str(folder), "k")
    before = again.newest()
    if written == 1:
        assert before is None
        return
    assert before.state == b"state %d" % (written - 2)
    again.write(b"new", {})
    assert Checkpoints(str(folder), "k").newest().state == b"new"


def test_going_on_never_writes_over_what_it_goes_on_from(tmp_path):
    first = Checkpoints(str(tmp_path), "k")
    for number in range(3):
        first.write(b"%d" % number, {})
    second = Checkpoints(str(tmp_path), "k")
    begun = second.newest()
    second.write(b"3", {})
    invalidate(str(tmp_path / FOLDERS[1]))
    assert Checkpoints(str(tmp_path), "k").newest() == begun


def test_clearing_removes_all(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), "k")
    checkpoints.write(b"0", {})
    checkpoints.write(b"1", {})
    checkpoints.clear()
    assert list(tmp_path.iterdir()) == []
    checkpoints.clear()
