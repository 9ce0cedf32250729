"""Files anywhere: a location is a local path or a URI (`s3://bucket/key`, `gs://...`), always a plain string.

Local files take the short way through the operating system; everything else goes through `pyarrow.fs`. Writes are
atomic: a reader sees the old file or the new one, never half of one. A URI is taken as it is written: nothing in it is
percent-decoded, so that names with spaces, `%`, `#` or `?` are what they are in a local folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from raymerge.errors import StorageError

CACHE_BYTES = 32 * 2**30  # copies of remote files on this machine; above it, those that nobody uses are removed
CACHE_REST_S = 3600.0  # a copy opened within this time may still be read from


@dataclass(frozen=True)
class FileInfo:
    """A file below a folder: posix path relative to it, size in bytes, modification time in nanoseconds."""

    path: str
    size: int
    mtime: int


def is_uri(location: str) -> bool:
    """Whether a location is a URI rather than a local path."""
    return "://" in location


def join(base: str, *parts: str) -> str:
    """A location below another one."""
    if is_uri(base):
        scheme, rest = base.split("://", 1)
        return f"{scheme}://{posixpath.join(rest, *parts)}"
    return os.path.join(base, *parts)


def resolve(workspace: str, location: str) -> str:
    """A location as written in a project file, made absolute from the workspace, with `.` and `..` folded. Raises
    StorageError if its bytes are no UTF-8, which no manifest and no table could name."""
    try:
        location.encode()
    except UnicodeEncodeError as error:
        shown = location.encode(errors="backslashreplace").decode()
        raise StorageError(f"{shown}: this path is not text in UTF-8.\nRename it.") from error
    if is_uri(location):
        return _fold(location)
    expanded = os.path.expanduser(location)
    if os.path.isabs(expanded):
        return expanded
    joined = join(workspace, expanded)
    return _fold(joined) if is_uri(joined) else os.path.normpath(joined)


def _fold(uri: str) -> str:
    """A URI without `.`, `..` and doubled slashes in its path; `..` never leaves the bucket."""
    scheme, rest = uri.split("://", 1)
    authority, _, path = rest.partition("/")
    folded = posixpath.normpath("/" + path.lstrip("/"))
    return f"{scheme}://{authority}{folded if folded != '/' or not authority else ''}"


def parent(location: str) -> str:
    """The folder that a file lies in."""
    return resolve(location, "..")


def name_of(location: str) -> str:
    """The last part of a location."""
    return posixpath.basename(location.rstrip("/"))


def _filesystem(location: str) -> tuple[Any, str]:
    scheme, rest = location.split("://", 1)
    authority, _, path = rest.partition("/")
    try:
        filesystem, base = _open_filesystem(f"{scheme}://{authority}" if authority else f"{scheme}:///")
    except Exception as error:
        raise StorageError(f"{location}: this location cannot be opened.\n{error}") from error
    return filesystem, posixpath.join(base or "/", path.strip("/")).rstrip("/") or "/"


@lru_cache(maxsize=64)
def _open_filesystem(root: str) -> tuple[Any, str]:
    """A bucket's filesystem and its path there; remembered, since opening a bucket asks its region over the network."""
    import pyarrow.fs

    filesystem, base = pyarrow.fs.FileSystem.from_uri(root)
    return filesystem, base


@contextmanager
def _asking(location: str) -> Iterator[None]:
    """What a storage answers with an error is a StorageError that names the location."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{location}: cannot be read.\n{error.strerror or error}") from error


def _kind(location: str) -> Any:
    """What is at a URI, as a `pyarrow.fs.FileType`."""
    filesystem, path = _filesystem(location)
    with _asking(location):
        return filesystem.get_file_info(path).type


def exists(location: str) -> bool:
    """Whether a file or folder is there."""
    if not is_uri(location):
        return os.path.exists(location)
    import pyarrow.fs

    return bool(_kind(location) != pyarrow.fs.FileType.NotFound)


def read_bytes(location: str) -> bytes:
    """A file's content. Raises StorageError if it cannot be read."""
    with _asking(location):
        if not is_uri(location):
            return Path(location).read_bytes()
        filesystem, path = _filesystem(location)
        with filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())


def write_bytes(location: str, data: bytes) -> None:
    """Write a file whole or not at all, making the folders above it. Raises StorageError if it cannot be."""
    try:
        if not is_uri(location):
            _write_local(Path(location), data)
            return
        filesystem, path = _filesystem(location)
        if filesystem.type_name == "local":
            _write_local(Path(path), data)
            return
        filesystem.create_dir(posixpath.dirname(path), recursive=True)
        with filesystem.open_output_stream(path) as stream:  # object stores show the object when it is closed
            stream.write(data)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{location}: cannot be written.\n{error.strerror or error}. Choose another `output` or free the place."
        ) from error


def _write_local(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(location: str) -> Any:
    """A JSON file's value. Raises StorageError if it is not JSON."""
    try:
        return json.loads(read_bytes(location))
    except ValueError as error:
        raise StorageError(f"{location}: is not JSON.\n{error}") from error


def encode_json(value: Any) -> bytes:
    """JSON as raymerge writes it: sorted keys, so that equal values are equal bytes."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def write_json(location: str, value: Any) -> None:
    """Write a value as JSON, atomically."""
    write_bytes(location, encode_json(value))


def encode_parquet(table: Any) -> bytes:
    """A pyarrow table as the bytes of a parquet file; equal tables give equal bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    return bytes(buffer.getvalue().to_pybytes())


def read_parquet(location: str) -> Any:
    """A pyarrow table from a parquet file. Raises StorageError if it is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(pa.BufferReader(read_bytes(location)))
    except pa.ArrowInvalid as error:
        raise StorageError(f"{location}: is not a parquet file.\n{error}") from error


def list_files(location: str) -> list[FileInfo]:
    """All files below a folder, sorted by path; none if the folder is missing. Unfinished writes are left out."""
    found = _list_local(location) if not is_uri(location) else _list_remote(location)
    return sorted((f for f in found if not posixpath.basename(f.path).startswith(".")), key=lambda f: f.path)


def _list_local(location: str) -> Iterator[FileInfo]:
    for folder, _, names in os.walk(location):
        for name in names:
            full = os.path.join(folder, name)
            try:
                status = os.stat(full)
            except FileNotFoundError:  # renamed or removed while we look
                continue
            yield FileInfo(Path(os.path.relpath(full, location)).as_posix(), status.st_size, status.st_mtime_ns)


def _list_remote(location: str) -> Iterator[FileInfo]:
    import pyarrow.fs

    filesystem, path = _filesystem(location)
    selector = pyarrow.fs.FileSelector(path, recursive=True, allow_not_found=True)
    with _asking(location):
        infos = filesystem.get_file_info(selector)
    for info in infos:
        if info.type == pyarrow.fs.FileType.File:
            yield FileInfo(posixpath.relpath(info.path, path), info.size, info.mtime_ns or 0)


def list_folders(location: str) -> list[str]:
    """Names of the folders directly below a folder, sorted; none if it is missing."""
    return sorted(name for name, is_folder in _entries(location) if is_folder)


def list_names(location: str) -> list[str]:
    """Names of the files and folders directly below a folder, sorted; none if it is missing."""
    return sorted(name for name, _ in _entries(location) if not name.startswith("."))


def _entries(location: str) -> list[tuple[str, bool]]:
    """What lies directly below a folder: name, and whether it is a folder."""
    if not is_uri(location):
        if not os.path.isdir(location):
            return []
        with _asking(location):
            return [(entry.name, entry.is_dir()) for entry in os.scandir(location)]
    import pyarrow.fs

    filesystem, path = _filesystem(location)
    selector = pyarrow.fs.FileSelector(path, recursive=False, allow_not_found=True)
    with _asking(location):
        infos = filesystem.get_file_info(selector)
    return [(i.base_name, i.type == pyarrow.fs.FileType.Directory) for i in infos]


def file_info(location: str) -> FileInfo:
    """Size and time of one file. Raises StorageError if it is not there."""
    with _asking(location):
        if not is_uri(location):
            status = os.stat(location)
            return FileInfo(location, status.st_size, status.st_mtime_ns)
        filesystem, path = _filesystem(location)
        info = filesystem.get_file_info(path)
    if info.size is None:
        raise StorageError(f"{location}: there is no such file.")
    return FileInfo(location, info.size, info.mtime_ns or 0)


def open_local(location: str) -> Path:
    """A path on this machine that holds the file or folder: itself, or a copy fetched once per content state.

    Copies lie in `raymerge-cache-UID` of the temporary folder, which TMPDIR moves. Where they exceed 32 GiB, those not
    opened within the last hour are removed, the longest unused first. Raises StorageError if a URI has nothing there.
    """
    if not is_uri(location):
        return Path(location)
    import pyarrow.fs

    single = _kind(location) == pyarrow.fs.FileType.File
    state = [file_info(location)] if single else list_files(location)
    if not state:
        raise StorageError(f"{location}: there is no such file or folder.")
    key = digest_value([location, [[f.path, f.size, f.mtime] for f in state]]).removeprefix("sha256:")[:24]
    target = _cache_folder() / key / name_of(location)
    if not target.exists():
        prune_cache(_cache_folder(), CACHE_BYTES - sum(f.size for f in state))
        _fetch(location, [] if single else [f.path for f in state], target)
    os.utime(target.parent)  # when it was used last
    return target


def _fetch(location: str, files: list[str], target: Path) -> None:
    """Copy a file (no names given) or a folder's files to a place that is there only when all of it is."""
    partial = target.parent.with_name(f"{target.parent.name}.{os.getpid()}")
    try:
        for name in files or [""]:
            data = read_bytes(join(location, name) if name else location)
            write_bytes(str(partial / target.name / name), data)
        partial.rename(target.parent)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if not target.exists():  # else another process was first, and its copy is the same
            raise


def _cache_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"raymerge-cache-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise StorageError(f"{folder}: belongs to another user.\nSet TMPDIR to a folder of your own.")
    return folder


def prune_cache(folder: Path, limit: int) -> None:
    """Remove copies that rest, the longest unused first, until those left hold at most `limit` bytes or are in use."""
    entries = []
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):  # another process removes too
            entries.append((entry.stat().st_mtime, sum(f.size for f in _list_local(entry.path)), entry.path))
    held = sum(size for _, size, _ in entries)
    for used, size, path in sorted(entries):
        if held <= limit or used > time.time() - CACHE_REST_S:
            return
        shutil.rmtree(path, ignore_errors=True)
        held -= size


def remove(location: str) -> None:
    """Remove a file or a folder with everything in it, if it is there."""
    if not is_uri(location):
        path = Path(location)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return
    import pyarrow.fs

    kind = _kind(location)
    filesystem, path_there = _filesystem(location)
    if kind == pyarrow.fs.FileType.Directory:
        filesystem.delete_dir(path_there)
    elif kind == pyarrow.fs.FileType.File:
        filesystem.delete_file(path_there)


def digest_bytes(data: bytes) -> str:
    """Content digest of bytes: `sha256:` and 64 hexadecimal digits."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def digest_value(value: Any) -> str:
    """Digest of a JSON-able value; equal values give equal digests whatever the order of their keys."""
    return digest_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def digest(location: str) -> str:
    """Content digest of a file, remembered while its size and time stay the same."""
    info = file_info(location)
    return _digest_of_state(location, info.size, info.mtime)


@lru_cache(maxsize=100_000)
def _digest_of_state(location: str, size: int, mtime: int) -> str:
    if is_uri(location):
        return digest_bytes(read_bytes(location))
    with open(location, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def check_writable(folder: str) -> None:
    """Raise StorageError now if nothing can be written into a folder, rather than hours later."""
    probe = join(folder, f".raymerge-{os.getpid()}")
    write_bytes(probe, b"")
    remove(probe)
