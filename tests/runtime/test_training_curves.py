"""TensorBoard's event files, read back as TensorBoard reads them."""

import struct
import sys
from pathlib import Path

import pytest

from raymerge import storage
from raymerge.errors import ProjectError
from raymerge.runtime.training_curves import Curves, check_tensorboard, curves_folder


def read_curves(folder) -> dict[str, dict[int, float]]:
    """tag -> step -> value. A file that begins with a session start takes back the steps from there on."""
    from tensorboardX.proto import event_pb2

    found: dict[str, dict[int, float]] = {}
    for file in sorted(Path(folder).glob("events.out.tfevents.*")):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("session_log"):
                assert event.session_log.status == event_pb2.SessionLog.START
                found = {tag: {s: v for s, v in points.items() if s < event.step} for tag, points in found.items()}
            for value in event.summary.value:
                points = found.setdefault(value.tag, {})
                assert event.step not in points, f"step {event.step} of {value.tag} is there twice"
                points[event.step] = value.simple_value
    return found


@pytest.mark.parametrize("place", ["{}", "file://{}"])
def test_a_training_that_goes_on_has_each_step_once(tmp_path, place):
    folder = place.format(tmp_path)
    first = Curves(folder, resumed=False)
    first.begin("a")
    for step in range(1, 8):
        first.note("a", step, {"loss": step, "tokens per second": float("nan")})
    first.publish()
    first.note("a", 8, {"loss": 8})
    first.close()
    second = Curves(folder, resumed=True)
    for step in range(5, 11):
        second.note("a", step, {"loss": 100 + step})
        second.note("b", step, {"loss": 0})
    second.publish()
    second.close()
    assert read_curves(tmp_path / "a") == {
        "loss": {1: 1, 2: 2, 3: 3, 4: 4, 5: 105, 6: 106, 7: 107, 8: 108, 9: 109, 10: 110}
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_training_from_the_beginning_has_its_own_curves_alone(tmp_path):
    for value in (1, 2):
        curves = Curves(str(tmp_path), resumed=False)
        curves.begin("a")
        curves.note("a", 1, {"loss": value})
        curves.close()
    assert read_curves(tmp_path / "a") == {"loss": {1: 2}}


@pytest.mark.parametrize(
    ("item", "folder"),
    [
        ("/w/runs/_shared/training/persona/0003", "/w/runs/tensorboard"),
        ("s3://b/_shared/runs/_shared/training/unified", "s3://b/_shared/runs/tensorboard"),
        ("/w/runs/_shared/training/cluster/cluster_00", "/w/runs/tensorboard"),
        ("/w/runs/_shared/training/try/persona-4/train", "/w/runs/tensorboard/try/persona-4"),
        ("/w/runs/_shared/training/neighbours/0000", "/w/runs/tensorboard/neighbours"),
        ("/w/elsewhere", "/w/elsewhere/tensorboard"),
    ],
)
def test_curves_lie_in_the_output(item, folder):
    assert curves_folder(item) == folder


def test_where_the_package_is_missing_it_is_named(monkeypatch):
    check_tensorboard()
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ProjectError, match=r"^training\.tensorboard: needs the package tensorboardX[\s\S]*pip install"):
        check_tensorboard()


def test_a_uri_is_a_place_for_curves_too(tmp_path):
    curves = Curves(f"file://{tmp_path}", resumed=False)
    curves.note("a", 1, {"loss": 1})
    assert storage.list_files(str(tmp_path)) == []
    curves.publish()
    curves.note("a", 2, {"loss": 2})
    curves.publish()
    curves.close()
    assert read_curves(tmp_path / "a") == {"loss": {1: 1, 2: 2}}
