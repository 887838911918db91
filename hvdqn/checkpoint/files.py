"""Write and read one file of a checkpoint: nested dicts and lists of numbers, text and arrays, as safetensors.

The arrays are the tensors of the safetensors file. Everything else is JSON in the file's metadata, in which
`{"__array__": NAME}` takes the place of an array. Reading a file never executes anything in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray

from hvdqn.replay.streamed import StreamedArray, pieces

_DTYPES = {
    "|b1": "BOOL", "|u1": "U8", "|i1": "I8", "<i2": "I16", "<u2": "U16", "<i4": "I32", "<u4": "U32",
    "<i8": "I64", "<u8": "U64", "<f2": "F16", "<f4": "F32", "<f8": "F64",
}  # fmt: skip
_ARRAY, _DTYPE = "__array__", "__dtype__"
_BLOCK_BYTES = 1 << 24
MAX_HEADER_BYTES = 100_000_000
"""The longest header that the safetensors library reads."""
_UNREADABLE = (
    safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, IndexError
)  # fmt: skip


class BrokenCheckpointError(RuntimeError):
    """Raised for a checkpoint that is incomplete, or that differs from what was written."""


def write_part(path: Path, content: Any, alive: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Write one file of a checkpoint; return its `sha256` and its size in `bytes`, for the manifest.

    It writes arrays straight from their own memory, because a rank's replay may not fit into memory twice; the
    safetensors library's own writer makes a copy. A second thread computes the hash during the write.

    An array that appears several times in `content`, as the same object, is stored once.

    Args:
        path: the file to write.
        content: nested dicts and lists of numbers, text, None, NumPy arrays, `StreamedArray`s and tensors.
        alive: called after each block of 16 MiB, so that the watchdog sees that the write makes progress.

    Raises:
        OSError: the file cannot be written.
        TypeError: `content` holds any other type.
        ValueError: `content` has more text and numbers outside of arrays than such a file can hold, or is nested too
            deeply.
    """
    arrays = Arrays()
    header = _header(arrays.extract(content), arrays.by_name)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as hasher:
        for block in _blocks(header, arrays.by_name):
            for start in range(0, len(block), _BLOCK_BYTES):
                piece = block[start : start + _BLOCK_BYTES]
                hashed = hasher.submit(digest.update, piece)
                _write_all(file, piece)
                hashed.result()
                alive()
        os.fsync(file.fileno())
        size = file.tell()
    return {"sha256": digest.hexdigest(), "bytes": size}


def read_part(path: Path) -> Any:
    """Return the content of a file that `write_part` wrote; tensors come back as NumPy arrays, tuples as lists.

    The arrays are views of the memory-mapped file, so the system reads them from disk when they are used. Copy those
    that you need after the file is deleted or overwritten.

    Raises:
        BrokenCheckpointError: the file is missing or is not in this format.
    """
    try:
        # The "pt" framework maps the file into memory; the "numpy" framework would copy each array.
        with safetensors.safe_open(path, framework="pt") as file:
            data = json.loads(file.metadata()["data"])
            return _insert_arrays(data, file, {})
    except _UNREADABLE as error:
        raise BrokenCheckpointError(f"{path} cannot be read: {error}") from None


def file_digest(path: Path, alive: Callable[[], None] = lambda: None) -> tuple[str, int]:
    """Return the sha256 of a file and its size in bytes.

    Args:
        path: the file to read.
        alive: called after each block of 16 MiB, so that the watchdog sees that the read makes progress.

    Raises:
        OSError: the file cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
            alive()
    return digest.hexdigest(), size


def _header(data: Any, arrays: Mapping[str, NDArray[Any] | StreamedArray]) -> bytes:
    """Return the first bytes of a safetensors file: the length of its header, then the header as padded JSON.

    Args:
        data: what `Arrays.extract` returned.
        arrays: the arrays by name, in the order in which they are written.

    Raises:
        ValueError: the header is longer than the safetensors library reads.
    """
    header: dict[str, Any] = {"__metadata__": {"data": json.dumps(data)}}
    offset = 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": _DTYPES[array.dtype.str],
            "shape": array.shape,
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > MAX_HEADER_BYTES:
        raise ValueError(
            f"it has {len(encoded) / 1e6:.0f} MB of lists and text, and a file of a checkpoint holds at most "
            f"{MAX_HEADER_BYTES / 1e6:.0f} MB"
        )
    return struct.pack("<Q", len(encoded)) + encoded


class Arrays:
    """Collects the arrays in the content of one file, and gives each a name in the file.

    Attributes:
        by_name: the arrays by name, in the order in which they are written.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, NDArray[Any] | StreamedArray] = {}
        # By the id of each array: the array, and the dict that replaces it. Holding the array keeps its id from being
        # given to another object.
        self._entries: dict[int, tuple[object, dict[str, str]]] = {}

    def extract(self, content: Any) -> Any:
        """Return `content` as JSON data, with each array replaced by a dict that holds its name.

        Raises:
            TypeError: the content holds an object that `write_part` does not accept.
            ValueError: the content is nested too deeply.
        """
        try:
            return self._extract(content)
        except RecursionError:
            raise ValueError("the state is nested too deeply to be written") from None

    def _extract(self, content: Any) -> Any:
        if isinstance(content, (np.ndarray, torch.Tensor, StreamedArray)):
            if id(content) not in self._entries:
                self._entries[id(content)] = content, self._add(content)
            return self._entries[id(content)][1]
        if isinstance(content, np.generic):
            return self._add(np.asarray(content))
        if isinstance(content, Mapping):
            if _ARRAY in content:
                raise ValueError(f"the name {_ARRAY} is reserved")
            return {str(key): self._extract(value) for key, value in content.items()}
        if isinstance(content, (list, tuple)):
            return [self._extract(value) for value in content]
        if content is None or isinstance(content, (str, int, float)):
            return content
        raise TypeError(f"{type(content).__name__} is not plain data")

    def _add(self, array: NDArray[Any] | torch.Tensor | StreamedArray) -> dict[str, str]:
        """Add an array to `by_name`; return the dict that replaces it in the JSON data."""
        if isinstance(array, torch.Tensor):
            array = array.detach().cpu().numpy()
        if array.dtype.kind not in "biufcSU":
            raise TypeError(f"an array of {array.dtype} is not plain data")
        name, dtype = str(len(self.by_name)), array.dtype.str
        if isinstance(array, np.ndarray):
            # `ascontiguousarray` copies only strided arrays, and replay has none. It also gives scalars one axis, which
            # `reshape` takes away again.
            array = np.ascontiguousarray(array).reshape(array.shape)
        if dtype in _DTYPES:
            self.by_name[name] = array
            return {_ARRAY: name}
        # safetensors has no complex numbers, text or big-endian numbers: store them as bytes.
        self.by_name[name] = np.asarray(array)[..., None].view(np.uint8)
        return {_ARRAY: name, _DTYPE: dtype}


def _insert_arrays(data: Any, file: Any, arrays: dict[str, NDArray[Any]]) -> Any:
    """Return `data` with each dict that names an array replaced by that array.

    Args:
        data: the JSON data in the file's metadata.
        file: the open safetensors file.
        arrays: the arrays that were read so far, by name, so that an array in several places is one object again.
    """
    if isinstance(data, dict):
        if _ARRAY in data:
            name = data[_ARRAY]
            if name not in arrays:
                arrays[name] = file.get_tensor(name).numpy()
            return arrays[name].view(data[_DTYPE])[..., 0] if _DTYPE in data else arrays[name]
        return {key: _insert_arrays(value, file, arrays) for key, value in data.items()}
    if isinstance(data, list):
        return [_insert_arrays(value, file, arrays) for value in data]
    return data


def _blocks(header: bytes, arrays: Mapping[str, NDArray[Any] | StreamedArray]) -> Iterator[memoryview]:
    """Yield the bytes of a file in order: the header, then each array; a `StreamedArray` comes in pieces."""
    yield memoryview(header)
    for array in arrays.values():
        if isinstance(array, StreamedArray):
            for _, piece in pieces(array):
                yield _bytes_of(np.ascontiguousarray(piece))
        else:
            yield _bytes_of(array)


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


def _write_all(file: Any, view: memoryview) -> None:
    while len(view):
        view = view[file.write(view) :]  # an unbuffered write may write only a part
