"""safetensors files: the header alone, one tensor at a time, and written with the same bytes for the same content.

Tensors are read into memory of their own, by byte range: a merge of hundreds of adapters then holds the module it
works on and nothing else, where a memory map would keep every page ever touched. And the order of a file's metadata
is fixed here, as that of everything else is.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raymerge.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U64": 8, "U32": 4, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorHeader:
    """A tensor's dtype as the file names it, its shape, and its bytes in the file: from start to before end."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header has been read and agrees with its size."""

    path: str
    tensors: Mapping[str, TensorHeader]
    metadata: Mapping[str, str]


def open_tensors(path: str, where: str) -> TensorFile:
    """Read a file's header. `where` names the file in errors. Raises AdapterError if it is missing, truncated or no
    safetensors file."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise AdapterError(f"{where} is truncated or no safetensors file ({size} bytes).\n{_AGAIN}")
            text = file.read(length)
    except OSError as error:
        raise AdapterError(f"{where} cannot be read.\n{error.strerror}.") from error
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        tensors = {str(name): _tensor_header(entry, 8 + length) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise AdapterError(f"{where} has a broken header.\n{_AGAIN}") from error
    _check_layout(tensors, 8 + length, size, where)
    return TensorFile(path, tensors, {str(key): str(value) for key, value in dict(metadata).items()})


_AGAIN = "Copy or save it again."


def _tensor_header(entry: Any, offset: int) -> TensorHeader:
    shape = tuple(int(n) for n in entry["shape"])
    start, end = (int(n) for n in entry["data_offsets"])
    dtype = str(entry["dtype"])
    if min(shape, default=1) < 0 or not 0 <= start <= end:
        raise ValueError("negative size")
    if dtype in ITEM_BYTES and math.prod(shape) * ITEM_BYTES[dtype] != end - start:
        raise ValueError("shape and bytes disagree")
    return TensorHeader(dtype, shape, offset + start, offset + end)


def _check_layout(tensors: Mapping[str, TensorHeader], begin: int, size: int, where: str) -> None:
    expected = begin
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.end)):
        if tensor.start != expected:
            raise AdapterError(f"{where} has tensors that overlap or leave holes.\n{_AGAIN}")
        expected = tensor.end
    if expected > size:
        raise AdapterError(f"{where} is truncated: expected {expected} bytes, found {size}.\n{_AGAIN}")
    if expected < size:
        raise AdapterError(f"{where} is {size} bytes where its header says {expected}.\n{_AGAIN}")


def read_tensors(file: TensorFile, names: Sequence[str], where: str) -> list[Tensor]:
    """Read tensors into fresh memory, on the CPU. Raises AdapterError for a dtype that is no float, or a file that
    has shrunk since its header was read."""
    import torch

    found = []
    try:
        with open(file.path, "rb", buffering=0) as stream:
            for name in names:
                header = file.tensors[name]
                if header.dtype not in FLOATS:
                    raise AdapterError(f"{where}: {name} is of type {header.dtype}.\nExpected {', '.join(FLOATS)}.")
                raw = torch.empty(header.end - header.start, dtype=torch.uint8)
                stream.seek(header.start)
                if _read_into(stream, raw.numpy().data) != raw.numel():
                    raise AdapterError(f"{where} is truncated.\n{_AGAIN}")
                found.append(raw.view(getattr(torch, FLOATS[header.dtype])).reshape(header.shape))
    except OSError as error:
        raise AdapterError(f"{where} cannot be read.\n{error.strerror}.") from error
    return found


def check_finite(tensor: Tensor, name: str, where: str) -> None:
    """Raise AdapterError, naming the tensor, if it holds NaN or Inf. `where` names adapter and file."""
    import torch

    accumulator = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    if math.isfinite(float(tensor.sum(dtype=accumulator))):
        return
    spoilt = int((~tensor.isfinite()).sum())
    if spoilt == 0:  # finite values whose sum is not: nothing wrong with them
        return
    kind = "NaN" if bool(tensor.isnan().any()) else "Inf"
    raise AdapterError(
        f"{where} holds {kind} in {name} ({spoilt} of {tensor.numel()} values).\n"
        f"Merging it would spoil every persona it contributes to. Retrain it, or leave {where.partition(':')[0]} out."
    )


class StoredTensors(Mapping[str, "Tensor"]):
    """Tensors that stay in their file. Each access reads one, checks that it is finite, and keeps none.

    names: the file's name of each tensor by the name it has here. shapes: without reading.
    """

    def __init__(self, file: TensorFile, names: Mapping[str, str], where: str) -> None:
        self._file, self._names, self._where = file, {name: names[name] for name in sorted(names)}, where
        self.shapes = {name: file.tensors[key].shape for name, key in self._names.items()}
        self.nbytes = sum(file.tensors[key].end - file.tensors[key].start for key in self._names.values())

    def __getitem__(self, name: str) -> Tensor:
        (tensor,) = read_tensors(self._file, [self._names[name]], self._where)
        check_finite(tensor, name, self._where)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping would read the tensor to find out


def _read_into(stream: Any, buffer: memoryview) -> int:
    done = 0
    while done < len(buffer):
        count = stream.readinto(buffer[done:])
        if not count:
            break
        done += count
    return done


def encode_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file: widest items first, then by name, metadata sorted."""
    import torch

    names = {getattr(torch, name): code for code, name in FLOATS.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    blocks, end = [], 0
    for name in order:
        tensor = tensors[name].detach().cpu().contiguous()
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        blocks.append(tensor.view(-1).view(torch.uint8).numpy().data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *blocks])
