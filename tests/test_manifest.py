import json

import pytest

from raymerge.manifest import NAME, content_digest, is_complete, read_manifest, write_artefact

FILES = {"a.bin": b"1234", "b.json": b"{}"}


def test_complete_only_with_its_key(tmp_path):
    write_artefact(str(tmp_path), FILES, {"name": "x"}, "key")
    assert is_complete(str(tmp_path), "key")
    assert not is_complete(str(tmp_path), "other key")
    assert read_manifest(str(tmp_path))["name"] == "x"


@pytest.mark.parametrize("lost", sorted(FILES))
def test_incomplete_when_a_file_is_lost_or_cut(tmp_path, lost):
    write_artefact(str(tmp_path), FILES, {}, "key")
    (tmp_path / lost).write_bytes(FILES[lost][:-1])
    assert not is_complete(str(tmp_path), "key")
    (tmp_path / lost).unlink()
    assert not is_complete(str(tmp_path), "key")


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"unfinished": True}), json.dumps({"key": "key"})])
def test_a_broken_marker_is_none(tmp_path, text):
    write_artefact(str(tmp_path), FILES, {}, "key")
    (tmp_path / NAME).write_text(text)
    assert read_manifest(str(tmp_path)) is None
    assert not is_complete(str(tmp_path), "key")


def test_interrupted_rewrite_is_not_the_old_artefact(tmp_path):
    write_artefact(str(tmp_path), FILES, {}, "key")

    class Interrupted(dict):
        def __getitem__(self, name):
            if name == "b.json":
                raise KeyboardInterrupt
            return super().__getitem__(name)

    with pytest.raises(KeyboardInterrupt):
        write_artefact(str(tmp_path), Interrupted({"a.bin": b"5678", "b.json": b"[]"}), {}, "new key")
    assert not is_complete(str(tmp_path), "key")
    assert not is_complete(str(tmp_path), "new key")


def test_content_digest_is_of_the_files_alone(tmp_path):
    write_artefact(str(tmp_path / "one"), FILES, {"name": "one"}, "k1")
    write_artefact(str(tmp_path / "two"), FILES, {"name": "two"}, "k2")
    write_artefact(str(tmp_path / "three"), {**FILES, "a.bin": b"4321"}, {}, "k1")
    assert content_digest(str(tmp_path / "one")) == content_digest(str(tmp_path / "two"))
    assert content_digest(str(tmp_path / "one")) != content_digest(str(tmp_path / "three"))
    assert content_digest(str(tmp_path / "absent")) is None
