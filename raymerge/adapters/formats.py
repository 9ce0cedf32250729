"""One door to adapters in PEFT's and in MLX's form: what lies at a location decides who reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from raymerge import manifest, storage
from raymerge.adapters import mlx, peft
from raymerge.errors import AdapterError, StorageError, unknown

if TYPE_CHECKING:
    from raymerge.adapters.adapter import LoraAdapter
    from raymerge.adapters.base_weights import BaseWeights

FORMATS = ("peft", "mlx")
CONFIG = peft.CONFIG

AdapterHeader: TypeAlias = peft.AdapterHeader | mlx.MlxHeader


def format_of(location: str, name: str | None = None) -> str:
    """The format of the adapter in a folder, or of one of its `.safetensors` files: `peft` or `mlx`.

    The configuration decides, and where it does not say, the names of the weight files. Raises AdapterError, with the
    files that are there, if it is neither; and if the location is no text in UTF-8, which no manifest could name.
    """
    _check_text(location, name)
    folder = mlx.folder_of(location)
    try:
        config = storage.read_json(storage.join(folder, CONFIG))
    except StorageError:
        config = None
    if isinstance(config, dict) and config.get("peft_type") is not None:
        return "peft"
    if isinstance(config, dict) and ("lora_parameters" in config or "fine_tune_type" in config):
        return "mlx"
    if any(storage.exists(storage.join(folder, file)) for file in (peft.WEIGHTS, peft.PICKLE)):
        return "peft"
    if any(storage.exists(storage.join(folder, file)) for file in mlx.WEIGHTS):
        return "mlx"
    raise AdapterError(_nothing(location, folder, name or location))


def _nothing(location: str, folder: str, name: str) -> str:
    files = storage.list_names(folder)
    shown = ", ".join(files[:6]) + (f" and {len(files) - 6} more" if len(files) > 6 else "")
    place = "" if name == location else f" in {folder}"
    return (
        f"{name}: there is no adapter{place}.\n"
        f"Expected {CONFIG} with {peft.WEIGHTS} (PEFT) or {mlx.WEIGHTS[0]} (MLX); found {shown or 'nothing'}."
    )


def _check_text(location: str, name: str | None) -> None:
    """Raise AdapterError for a path whose bytes are no UTF-8. Python reads those as lone surrogates."""
    try:
        location.encode()
    except UnicodeEncodeError as error:
        shown = location.encode(errors="backslashreplace").decode()
        named = (name or storage.name_of(location)).encode(errors="backslashreplace").decode()
        raise AdapterError(f"{named}: the path of this adapter is not text in UTF-8.\nRename it: {shown}") from error


def check_finished(location: str, name: str | None = None) -> None:
    """Raise AdapterError for an adapter that raymerge began to write and did not finish: its files may be of two."""
    if manifest.is_unfinished(mlx.folder_of(location)):
        raise AdapterError(
            f"{name or location}: was begun and not finished.\nWhat makes it failed, was killed, or is at work."
        )


def weight_files(location: str) -> tuple[str, str]:
    """Locations of the two files that make an adapter: its weights and its configuration. Raises AdapterError if it is
    in no known format, or its weights are missing."""
    name, folder = storage.name_of(location), mlx.folder_of(location)
    if format_of(location) == "mlx":
        weights = mlx.find_weights(location, name)
    else:
        folder = _peft_folder(location, name)
        has_pickle_only = not storage.exists(storage.join(folder, peft.WEIGHTS)) and storage.exists(
            storage.join(folder, peft.PICKLE)
        )
        weights = peft.PICKLE if has_pickle_only else peft.WEIGHTS
    return storage.join(folder, weights), storage.join(folder, CONFIG)


def adapter_digest(location: str, name: str | None = None) -> str:
    """Content digest of the two files that make an adapter. name: by which errors begin.

    Raises AdapterError if a file is missing, or the adapter was begun and never finished.
    """
    try:
        check_finished(location)
        return storage.digest_value([storage.digest(file) for file in weight_files(location)])
    except AdapterError as error:
        if name is None or str(error).startswith(name):
            raise
        raise type(error)(f"{name}: {error}") from error
    except OSError as error:
        where = location if name is None else f"{name}: {location}"
        raise AdapterError(f"{where}: there is no adapter.\n{error}") from error


def _peft_folder(location: str, name: str | None) -> str:
    folder = mlx.folder_of(location)
    if folder != location and storage.name_of(location) != peft.WEIGHTS:
        raise AdapterError(
            f"{name or location}: is no adapter in PEFT's form.\nExpected a folder, or its {peft.WEIGHTS}."
        )
    return folder


def read_header(location: str, name: str | None = None) -> AdapterHeader:
    """An adapter's configuration and shapes, checked, without its weights.

    Raises UnsupportedAdapterError, naming the option, for what cannot be read exactly; AdapterError for what is
    missing, truncated or does not fit together.
    """
    if format_of(location, name) == "mlx":
        return mlx.read_header(location, name)
    return peft.read_header(_peft_folder(location, name), name)


def open_adapter(location: str, name: str | None = None, *, base: BaseWeights | None = None) -> LoraAdapter:
    """An adapter that reads each module when it is asked for, and keeps none: for merges of many.

    location: a folder or URI; in MLX's form also one of its checkpoints (`0000100_adapters.safetensors`). base: the
    base's weights, on which DoRA's deltas depend. Raises what read_header raises, and AdapterError for an adapter that
    was begun and not finished; reading a module raises AdapterError if it holds NaN or Inf.
    """
    check_finished(location, name)
    if format_of(location, name) == "mlx":
        return mlx.open_adapter(location, name, base=base)
    return peft.open_adapter(_peft_folder(location, name), name, base=base)


def read_adapter(
    location: str, name: str | None = None, *, allow_pickle: bool = False, base: BaseWeights | None = None
) -> LoraAdapter:
    """Read an adapter whole. name: the folder's, unless given. base: as in open_adapter.

    allow_pickle: read `adapter_model.bin` where there is no safetensors file, with torch's loader for weights only.
    Raises what open_adapter raises, and AdapterError if it holds NaN or Inf.
    """
    check_finished(location, name)
    if format_of(location, name) == "mlx":
        return mlx.read_adapter(location, name, base=base)
    return peft.read_adapter(_peft_folder(location, name), name, allow_pickle=allow_pickle, base=base)


def load_adapter(folder: str, *, base: BaseWeights | None = None) -> LoraAdapter:
    """Read an adapter from a folder or URI; the counterpart of save_adapter. Raises what read_adapter raises."""
    return read_adapter(str(folder), base=base)


def encode_adapter(adapter: LoraAdapter, format: str = "peft") -> dict[str, bytes]:
    """The files of an adapter, by name. Equal adapters give equal bytes.

    Raises UnsupportedAdapterError, by name, for what the format cannot express; AdapterError for an unknown format or
    an adapter without modules.
    """
    if format not in FORMATS:
        raise AdapterError(f"{adapter.name}: {unknown('format', format, FORMATS)}")
    return mlx.encode_adapter(adapter) if format == "mlx" else peft.encode_adapter(adapter)


def save_adapter(adapter: LoraAdapter, folder: str, format: str = "peft") -> None:
    """Write an adapter in PEFT's or MLX's form, with a manifest that states the error of each module.

    Raises what encode_adapter raises, and AdapterError where it would replace an adapter that was trained, not written
    here.
    """
    files = encode_adapter(adapter, format)
    marker = storage.join(str(folder), manifest.NAME)
    if storage.exists(storage.join(str(folder), CONFIG)) and not storage.exists(marker):
        raise AdapterError(f"{folder}: holds an adapter that was not written by raymerge.\nChoose another folder.")
    described = {"name": adapter.name, "errors": dict(sorted(adapter.errors.items()))}
    key = storage.digest_value({name: storage.digest_bytes(data) for name, data in files.items()})
    manifest.write_artefact(str(folder), files, described, key)
