"""Checkpoints: whole or not there at all, checksummed, without pickle, one shard a rank.

    checkpoints/000000050000/      env steps, zero-padded
        manifest.json              versions, config, world size, size and sha256 of every file
        learner.safetensors        networks and optimizer, clock and counters (rank 0)
        rank-00000.safetensors     that rank's replay shard, random states and environments
    checkpoints/latest             link to the newest whole one
    checkpoints/best               weights of the best evaluation

A checkpoint is written under a temporary name, flushed to the disk, then renamed: a name without a dot is whole.
Each file is in safetensors format; what is not an array stands as JSON in its header.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray

from hvdqn import __version__
from hvdqn.comm import Comm

FORMAT = 1
MANIFEST = "manifest.json"
LEARNER = "learner"
_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32",
    "int64": "I64", "uint64": "U64", "float16": "F16", "float32": "F32", "float64": "F64",
}  # fmt: skip


class BrokenCheckpointError(RuntimeError):
    """A checkpoint that is not what was written."""


def rank_part(rank: int) -> str:
    """Name of the part that one rank writes."""
    return f"rank-{rank:05d}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, its manifest read and found consistent."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def env_steps(self) -> int:
        """Global env steps at which it was written."""
        return int(self.manifest["env_steps"])

    @property
    def world_size(self) -> int:
        """Ranks that wrote it."""
        return int(self.manifest["world_size"])

    def verify(self, name: str) -> None:
        """Compare a file with the manifest.

        Raises:
            BrokenCheckpointError: missing, of another length, or of another content.
        """
        expected = self.manifest["files"][name]
        try:
            found = _digest(self.path / name)
        except OSError as error:
            raise BrokenCheckpointError(f"{self.path / name}: {error.strerror}") from None
        if found != (expected["sha256"], expected["bytes"]):
            raise BrokenCheckpointError(
                f"{self.path / name} is not what was written (sha256 or length differs)"
            )

    def read(self, part: str) -> Any:
        """One verified part, as it was given to `save`.

        Raises:
            BrokenCheckpointError: the file is broken.
        """
        name = part + ".safetensors"
        self.verify(name)
        return read_part(self.path / name)

    def has(self, part: str) -> bool:
        """Whether the part was written."""
        return part + ".safetensors" in self.manifest["files"]


def open_checkpoint(path: Path) -> Checkpoint:
    """Read and check a manifest.

    Raises:
        BrokenCheckpointError: it is missing, torn, altered, or of a format that is not known here.
    """
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        manifest.pop("sha256")
        whole = text == _manifest_text(manifest)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise BrokenCheckpointError(f"{path / MANIFEST} is missing or torn") from None
    if not whole:
        raise BrokenCheckpointError(f"{path / MANIFEST} is not what was written (sha256 differs)")
    if manifest["format"] != FORMAT:
        raise BrokenCheckpointError(f"{path} has format {manifest['format']}, this version reads {FORMAT}")
    return Checkpoint(path, manifest)


class Checkpoints:
    """The checkpoints of one run directory, which all ranks see. Every method is collective.

    Args:
        directory: `RUN_DIR/checkpoints`.
        comm: the ranks.
        keep: newest checkpoints kept.
    """

    def __init__(self, directory: Path, comm: Comm, keep: int) -> None:
        self.directory, self.comm, self.keep = directory, comm, keep

    def save(
        self, env_steps: int, parts: Mapping[str, Any], config: Mapping[str, Any], name: str = ""
    ) -> str:
        """Write a checkpoint; return "" or, where any rank failed, why. The ones before stay as they are.

        Args:
            env_steps: names the directory.
            parts: what this rank writes: plain data with arrays for leaves, by the name of the part.
            config: kept in the manifest.
            name: another name than env steps.
        """
        name = name or f"{env_steps:012d}"
        temporary = self.directory / f".{name}.tmp"
        failure = self._on_rank_0(lambda: _fresh_directory(temporary))
        if failure:
            return failure
        files: dict[str, Any] = {}
        try:
            for part, content in parts.items():
                files[part + ".safetensors"] = write_part(temporary / (part + ".safetensors"), content)
        except OSError as error:
            failure = f"rank {self.comm.rank}: {error}"
        reports = self.comm.all_gather_object((failure, files))
        failures = [text for text, _ in reports if text]
        if failures:
            self._on_rank_0(lambda: shutil.rmtree(temporary, ignore_errors=True))
            return failures[0]
        merged = {file: entry for _, shard in reports for file, entry in shard.items()}
        return self._on_rank_0(lambda: self._commit(temporary, name, env_steps, merged, config))

    def newest_whole(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that every rank finds whole, and what was wrong with newer ones."""
        wrong: list[str] = []
        names = self.comm.broadcast_object(self._names() if self.comm.rank == 0 else [])
        for name in reversed(names):
            found, error = None, None
            try:
                found = open_checkpoint(self.directory / name)
                files = sorted(found.manifest["files"])
                for file in files[self.comm.rank :: self.comm.size]:
                    found.verify(file)
            except BrokenCheckpointError as broken:
                error = str(broken)
            errors = [text for text in self.comm.all_gather_object(error) if text]
            if not errors:
                return found, wrong
            wrong.append(errors[0])
        return None, wrong

    def _names(self) -> list[str]:
        if not self.directory.is_dir():
            return []
        return sorted(entry.name for entry in self.directory.iterdir() if entry.name.isdigit())

    def _commit(
        self, temporary: Path, name: str, env_steps: int, files: Mapping[str, Any], config: Mapping[str, Any]
    ) -> None:
        manifest = {
            "format": FORMAT,
            "env_steps": env_steps,
            "world_size": self.comm.size,
            "versions": {
                "hvdqn": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
            "config": dict(config),
            "files": dict(files),
        }
        with (temporary / MANIFEST).open("w", encoding="utf-8") as file:
            file.write(_manifest_text(manifest))
            file.flush()
            os.fsync(file.fileno())
        _sync_directory(temporary)
        final = self.directory / name
        if final.exists():  # a run that fell back passes the same env steps again
            shutil.rmtree(final)
        temporary.rename(final)
        if name.isdigit():
            _link(self.directory / "latest", name)
            for old in self._names()[: -self.keep]:
                shutil.rmtree(self.directory / old, ignore_errors=True)
        _sync_directory(self.directory)

    def _on_rank_0(self, action: Any) -> str:
        """Do something on rank 0; tell every rank how it failed, or ""."""
        failure = ""
        if self.comm.rank == 0:
            try:
                action()
            except OSError as error:
                failure = f"rank 0: {error}"
        return str(self.comm.broadcast_object(failure))


def write_part(path: Path, content: Any) -> dict[str, Any]:
    """Write plain data with arrays for leaves as one safetensors file; return its `sha256` and `bytes`.

    Arrays go from where they are to the file, so that a replay shard needs no second copy in memory.
    The library's writer makes one; reading is left to it.

    Raises:
        OSError: the file cannot be written.
    """
    arrays: dict[str, NDArray[Any]] = {}
    data = _detach_arrays(content, arrays)
    header: dict[str, Any] = {"__metadata__": {"data": json.dumps(data)}}
    offset = 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": _DTYPES[array.dtype.name],
            "shape": array.shape,
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    blocks: list[bytes | memoryview] = [struct.pack("<Q", len(encoded)), encoded]
    blocks += [_bytes_of(array) for array in arrays.values()]
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for block in blocks:
            digest.update(block)
            _write_all(file, block)
        os.fsync(file.fileno())
        size = file.tell()
    return {"sha256": digest.hexdigest(), "bytes": size}


def read_part(path: Path) -> Any:
    """What `write_part` wrote. Nothing in the file is ever executed.

    Raises:
        BrokenCheckpointError: it is no such file.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            data = json.loads(file.metadata()["data"])
            return _attach_arrays(data, file)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
        raise BrokenCheckpointError(f"{path} cannot be read: {error}") from None


_ARRAY = "__array__"


def _detach_arrays(content: Any, arrays: dict[str, NDArray[Any]]) -> Any:
    """JSON-able copy of `content`; arrays are moved to `arrays` and leave their name behind."""
    if isinstance(content, torch.Tensor):
        content = content.detach().cpu().numpy()
    if isinstance(content, np.generic):
        content = np.asarray(content)
    if isinstance(content, np.ndarray):
        name = str(len(arrays))
        # An empty or scalar array keeps its shape; a strided one is copied, replay's are not strided.
        arrays[name] = np.ascontiguousarray(content).reshape(content.shape)
        return {_ARRAY: name}
    if isinstance(content, Mapping):
        return {str(key): _detach_arrays(value, arrays) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_detach_arrays(value, arrays) for value in content]
    if content is None or isinstance(content, (str, int, float)):
        return content
    raise TypeError(f"{type(content).__name__} is not plain data")


def _attach_arrays(data: Any, file: Any) -> Any:
    if isinstance(data, dict):
        if set(data) == {_ARRAY}:
            return file.get_tensor(data[_ARRAY])
        return {key: _attach_arrays(value, file) for key, value in data.items()}
    if isinstance(data, list):
        return [_attach_arrays(value, file) for value in data]
    return data


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


def _write_all(file: Any, block: bytes | memoryview) -> None:
    view = memoryview(block)
    while len(view):
        view = view[file.write(view[: 1 << 26]) :]


def _digest(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        digest = (
            hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest_blocks(file)
        )
        return digest.hexdigest(), file.tell()


def _digest_blocks(file: Any) -> Any:
    """hashlib.file_digest for Python 3.10."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest


def _manifest_text(manifest: Mapping[str, Any]) -> str:
    """The manifest as it stands in its file, its own digest last."""
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1)


def _fresh_directory(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(link: Path, target: str) -> None:
    """Point a symbolic link at another target in one step."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
