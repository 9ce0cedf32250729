import json
import os
import threading
import time

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


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """A folder of this test's own for copies of remote files."""
    folder = tmp_path_factory.mktemp("copies")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_round_trip_listing_and_removal(folder):
    place = storage.join(folder, "a", "b.bin")
    storage.write_bytes(place, b"one")
    storage.write_bytes(place, b"two!")
    storage.write_json(storage.join(folder, "c.json"), {"b": 1, "a": [None]})
    assert storage.read_bytes(place) == b"two!"
    assert storage.read_json(storage.join(folder, "c.json")) == {"a": [None], "b": 1}
    assert [(f.path, f.size) for f in storage.list_files(folder)][:1] == [("a/b.bin", 4)]
    assert storage.list_folders(folder) == ["a"]
    assert storage.list_names(folder) == ["a", "c.json"]
    assert storage.list_names(storage.join(folder, "none")) == []
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


def test_open_local_takes_a_single_file(folder):
    storage.write_bytes(storage.join(folder, "personas.jsonl"), b"{}")
    local = storage.open_local(storage.join(folder, "personas.jsonl"))
    assert local.is_file()
    assert (local.name, local.read_bytes()) == ("personas.jsonl", b"{}")


def test_open_local_says_what_is_not_there(tmp_path):
    with pytest.raises(StorageError, match=r"file://.*/absent: there is no such file or folder"):
        storage.open_local(f"file://{tmp_path}/absent")


def test_names_are_taken_as_they_are_written(folder):
    for name in ("a b", "50%25", "x#y?z"):
        storage.write_bytes(storage.join(folder, name, "f"), name.encode())
    assert storage.list_folders(folder) == ["50%25", "a b", "x#y?z"]
    assert storage.read_bytes(storage.join(folder, "50%25", "f")) == b"50%25"


def test_copies_of_remote_files_stay_within_a_bound(tmp_path, own_cache, monkeypatch):
    for name in "abcd":
        storage.write_bytes(f"file://{tmp_path}/{name}", name.encode() * 1000)
    copies = {name: storage.open_local(f"file://{tmp_path}/{name}") for name in "abc"}
    now = time.time()
    for age, name in enumerate("cab"):
        os.utime(copies[name].parent, (now - 90_000 + age, now - 90_000 + age))
    assert storage.open_local(f"file://{tmp_path}/c") == copies["c"]  # used now, so no longer the oldest
    monkeypatch.setattr(storage, "CACHE_BYTES", 3000)
    copies["d"] = storage.open_local(f"file://{tmp_path}/d")
    assert {name for name, copy in copies.items() if copy.exists()} == {"b", "c", "d"}
    storage.prune_cache(copies["b"].parents[1], 0)
    assert {name for name, copy in copies.items() if copy.exists()} == {"c", "d"}  # in use: kept whatever the bound


def test_a_fetch_that_breaks_off_leaves_nothing(tmp_path, own_cache, monkeypatch):
    storage.write_bytes(f"file://{tmp_path}/m/a", b"1")
    storage.write_bytes(f"file://{tmp_path}/m/b", b"2")
    read = storage.read_bytes

    def breaks(location):
        if location.endswith("/b"):
            raise StorageError(f"{location}: cannot be read.")
        return read(location)

    monkeypatch.setattr(storage, "read_bytes", breaks)
    with pytest.raises(StorageError, match="m/b"):
        storage.open_local(f"file://{tmp_path}/m")
    assert [f.path for f in storage.list_files(str(own_cache))] == []
    monkeypatch.undo()
    assert (storage.open_local(f"file://{tmp_path}/m") / "b").read_bytes() == b"2"


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
        ("s3://b/team", "runs/x", "s3://b/team/runs/x"), ("s3://b/team", ".", "s3://b/team"),
        ("s3://b/team/x", "../lora/./y", "s3://b/team/lora/y"), ("s3://b", "../../other", "s3://b/other"),
        ("/w", "gs://b/k/", "gs://b/k"), ("file:///w/x", "..", "file:///w"), ("s3://b/k", "/abs", "/abs"),
    ],
)  # fmt: skip
def test_resolve(workspace, location, expected):
    assert storage.resolve(workspace, location) == expected


def test_a_path_that_is_no_text_is_refused():
    with pytest.raises(StorageError, match=r"^od\\udcff: this path is not text in UTF-8"):
        storage.resolve("/w", os.fsdecode(b"od\xff"))
