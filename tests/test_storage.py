import json
import os
import threading

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge import storage
from raymerge.errors import StorageError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(params=["path", "uri"])
def folder(request, tmp_path):
    """The same folder as a local path, and as a URI that takes the way of object stores."""
    return str(tmp_path) if request.param == "path" else f"file://{tmp_path}"


def test_round_trip_listing_and_removal(folder):
    place = storage.join(folder, "a", "b.bin")
    storage.write_bytes(place, b"one")
    storage.write_bytes(place, b"two!")
    storage.write_json(storage.join(folder, "c.json"), {"b": 1, "a": [None]})
    assert storage.read_bytes(place) == b"two!"
    assert storage.read_json(storage.join(folder, "c.json")) == {"a": [None], "b": 1}
    assert [(f.path, f.size) for f in storage.list_files(folder)][:1] == [("a/b.bin", 4)]
    assert storage.list_folders(folder) == ["a"]
    storage.remove(storage.join(folder, "a"))
    assert not storage.exists(place)
    assert [f.path for f in storage.list_files(folder)] == ["c.json"]
    assert storage.list_files(storage.join(folder, "absent")) == []


def test_open_local_gives_the_same_files(folder):
    storage.write_bytes(storage.join(folder, "model", "w.bin"), b"weights")
    local = storage.open_local(storage.join(folder, "model"))
    assert (local / "w.bin").read_bytes() == b"weights"
    storage.write_bytes(storage.join(folder, "model", "w.bin"), b"new weights")
    assert (storage.open_local(storage.join(folder, "model")) / "w.bin").read_bytes() == b"new weights"


def test_digest_follows_the_content(folder):
    place = storage.join(folder, "x")
    storage.write_bytes(place, b"1")
    first = storage.digest(place)
    assert first == storage.digest_bytes(b"1")
    storage.write_bytes(place, b"22")
    assert storage.digest(place) == storage.digest_bytes(b"22")


@given(JSON)
def test_equal_values_have_equal_digests(value):
    again = json.loads(json.dumps(value))
    assert storage.digest_value(value) == storage.digest_value(again)
    assert json.loads(storage.encode_json(value)) == value


def test_a_reader_never_sees_half_a_file(tmp_path):
    place = str(tmp_path / "x")
    versions = [bytes([i]) * 200_000 for i in range(20)]
    storage.write_bytes(place, versions[0])

    def write():
        for version in versions:
            storage.write_bytes(place, version)

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while writer.is_alive():
        data = storage.read_bytes(place)
        seen.add((len(data), len(set(data))))
    writer.join()
    assert seen <= {(200_000, 1)}


def test_tables_round_trip_to_equal_bytes(tmp_path):
    table = pa.table({"persona": ["a", "b"], "x": [0.5, None]})
    data = storage.encode_parquet(table)
    assert data == storage.encode_parquet(table)
    storage.write_bytes(str(tmp_path / "t"), data)
    assert storage.read_parquet(str(tmp_path / "t")).equals(table)
    storage.write_bytes(str(tmp_path / "t"), b"no table")
    with pytest.raises(StorageError, match="not a parquet file"):
        storage.read_parquet(str(tmp_path / "t"))


def test_errors_name_the_place(folder):
    with pytest.raises(StorageError, match=r"absent.*cannot be read"):
        storage.read_bytes(storage.join(folder, "absent"))
    storage.write_bytes(storage.join(folder, "file"), b"{")
    with pytest.raises(StorageError, match="is not JSON"):
        storage.read_json(storage.join(folder, "file"))


def test_a_place_that_cannot_be_written_is_known_at_once(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        storage.check_writable(str(tmp_path / "file" / "below"))
    storage.check_writable(str(tmp_path / "new"))
    assert os.listdir(tmp_path / "new") == []


@pytest.mark.parametrize(
    ("workspace", "location", "expected"),
    [
        ("/w", "runs", "/w/runs"), ("/w", "../runs", "/runs"), ("/w", "/abs", "/abs"), ("/w", "s3://b/k", "s3://b/k"),
        ("s3://b/team", "runs/x", "s3://b/team/runs/x"),
    ],
)  # fmt: skip
def test_resolve(workspace, location, expected):
    assert storage.resolve(workspace, location) == expected
