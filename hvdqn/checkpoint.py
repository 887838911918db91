"""Checkpoints: whole or not there at all, checksummed, without pickle, one shard a rank.

    checkpoints/000000050000/      env steps, zero-padded
        manifest.json              versions, config, world size, size and sha256 of every file
        learner.safetensors        networks and optimizer, clock and counters (rank 0)
        rank-00000.safetensors     that rank's replay shard, random states and environments
    checkpoints/latest             link to the newest whole one
    checkpoints/best               link to the weights of the best evaluation

A checkpoint is written under a hidden name, flushed to the disk, then renamed. Training waits meanwhile: no row of
replay may change, and a copy would double its memory. `summary.json` tells how long, as phase `save`. Each file is in
safetensors format; what is not an array stands as JSON in its header. Nothing that is read is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray

from hvdqn import __version__
from hvdqn.comm import Comm
from hvdqn.metrics import PhaseTimer

FORMAT = 2
MANIFEST = "manifest.json"
LEARNER = "learner"
_DTYPES = {
    "|b1": "BOOL", "|u1": "U8", "|i1": "I8", "<i2": "I16", "<u2": "U16", "<i4": "I32", "<u4": "U32",
    "<i8": "I64", "<u8": "U64", "<f2": "F16", "<f4": "F32", "<f8": "F64",
}  # fmt: skip
_BLOCK_BYTES = 1 << 24


# What is not there, or is no file. Other errors of a disk may pass, and say nothing of what was written.
_MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


class BrokenCheckpointError(RuntimeError):
    """A checkpoint that is not what was written."""


class OtherFormatError(BrokenCheckpointError):
    """A checkpoint of another version of hvdqn, which nothing is wrong with."""


def rank_part(rank: int) -> str:
    """Name of the part that one rank writes."""
    return f"rank-{rank:05d}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, its manifest read and found consistent."""

    path: Path
    manifest: Mapping[str, Any]
    verified: bool = False
    """Some rank has compared each of its files with the manifest."""

    @property
    def env_steps(self) -> int:
        """Global env steps at which it was written."""
        return int(self.manifest["env_steps"])

    @property
    def world_size(self) -> int:
        """Ranks that wrote it."""
        return int(self.manifest["world_size"])

    def verify(self, name: str, alive: Callable[[], None] = lambda: None) -> None:
        """Compare a file with the manifest; `alive` is called from time to time.

        Raises:
            BrokenCheckpointError: missing, of another length, or of another content.
            OSError: it is there and cannot be read now.
        """
        expected = self.manifest["files"][name]
        try:
            found = _digest(self.path / name, alive)
        except _MISSING as error:
            raise BrokenCheckpointError(f"{self.path / name}: {error.strerror}") from None
        if found != (expected["sha256"], expected["bytes"]):
            raise BrokenCheckpointError(
                f"{self.path / name} is not what was written (sha256 or length differs)"
            )

    def read(self, part: str) -> Any:
        """One verified part, as it was given to `save`; see `read_part`.

        Raises:
            BrokenCheckpointError: the file is broken.
        """
        name = part + ".safetensors"
        if not self.verified:
            self.verify(name)
        return read_part(self.path / name)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read and check a manifest.

    Raises:
        BrokenCheckpointError: it is missing, torn or altered.
        OtherFormatError: it is whole, and of a format that is not known here.
    """
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        manifest.pop("sha256")
        whole = text == _manifest_text(manifest)
        version = manifest["format"]
    except (*_MISSING, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise BrokenCheckpointError(f"{path / MANIFEST} is missing or torn") from None
    if not whole:
        raise BrokenCheckpointError(f"{path / MANIFEST} is not what was written (sha256 differs)")
    if version != FORMAT:
        raise OtherFormatError(f"{path} has format {version}, this version reads {FORMAT}")
    return Checkpoint(path, manifest)


class Checkpoints:
    """The checkpoints of one run directory, which all ranks see. Every method is collective.

    Args:
        directory: `RUN_DIR/checkpoints`.
        comm: the ranks.
        keep: newest checkpoints kept.
        timer: told where ranks wait for each other, and that long work moves on.
    """

    def __init__(self, directory: Path, comm: Comm, keep: int, timer: PhaseTimer) -> None:
        self.directory, self.comm, self.keep, self.timer = directory, comm, keep, timer

    def save(
        self, env_steps: int, parts: Mapping[str, Any], config: Mapping[str, Any], best: bool = False
    ) -> str:
        """Write a checkpoint; return "" or, where any rank failed, why. The ones before stay as they are.

        Args:
            env_steps: names the directory.
            parts: what this rank writes: plain data with arrays for leaves, by the name of the part.
            config: kept in the manifest.
            best: it takes the place of `best`, not of `latest`.
        """
        name = f"{'best-' if best else ''}{env_steps:012d}"
        temporary = self.directory / f".{name}.tmp"
        failure = self._on_rank_0(lambda: self._make_empty(temporary))
        if failure:
            return failure
        files: dict[str, Any] = {}
        try:
            for part, content in parts.items():
                file = part + ".safetensors"
                files[file] = write_part(temporary / file, content, self.timer.alive)
        except OSError as error:
            failure = f"rank {self.comm.rank}: {error}"
        with self.timer.during("comm"):
            reports = self.comm.all_gather_object((failure, files))
        failure = next((text for text, _ in reports if text), "")
        if not failure:
            merged = {file: entry for _, shard in reports for file, entry in shard.items()}
            failure = self._on_rank_0(lambda: self._commit(temporary, name, env_steps, merged, config))
        if failure:
            self._on_rank_0(self._sweep)
        return failure

    def newest_whole(self) -> tuple[Checkpoint | None, dict[str, str]]:
        """The newest checkpoint that every rank finds whole, and the newer ones by name with what is wrong.

        Raises:
            OtherFormatError: a newer one is of another version; on all ranks.
        """
        broken: dict[str, str] = {}
        names = self.comm.broadcast_object(self._names() if self.comm.rank == 0 else [])
        for name in reversed(names):
            found, error = None, None
            try:
                found = open_checkpoint(self.directory / name)
                files = sorted(found.manifest["files"])
                for file in files[self.comm.rank :: self.comm.size]:
                    found.verify(file, self.timer.alive)
            except BrokenCheckpointError as wrong:
                error = wrong
            with self.timer.during("comm"):
                errors = [one for one in self.comm.all_gather_object(error) if one]
            for one in errors:
                if isinstance(one, OtherFormatError):
                    raise one
            if found is not None and not errors:
                return replace(found, verified=True), broken
            broken[name] = str(errors[0])
        return None, broken

    def fall_back(self, found: Checkpoint | None, broken: Mapping[str, str]) -> None:
        """Set broken checkpoints aside as `NAME.broken`, and let `latest` point at the one found."""
        if broken:
            self._on_rank_0(lambda: self._set_aside(found, broken))

    def _set_aside(self, found: Checkpoint | None, broken: Mapping[str, str]) -> None:
        for name in broken:
            aside = self.directory / f"{name}.broken"
            shutil.rmtree(aside, ignore_errors=True)
            (self.directory / name).rename(aside)
        latest = self.directory / "latest"
        if found is None:
            latest.unlink(missing_ok=True)
        else:
            _link(latest, found.path.name)

    def _names(self) -> list[str]:
        if not self.directory.is_dir():
            return []
        return sorted(entry.name for entry in self.directory.iterdir() if entry.name.isdigit())

    def _make_empty(self, temporary: Path) -> None:
        self._sweep()
        temporary.mkdir(parents=True)

    def _sweep(self) -> None:
        """Take away what attempts that were killed or failed have left."""
        for left in self.directory.glob(".*.tmp"):
            shutil.rmtree(left, ignore_errors=True)

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
        if final.exists():  # such as an evaluation repeated after a resume, and better this time
            final.rename(self.directory / f".{name}.old.tmp")
        temporary.rename(final)
        _link(self.directory / ("latest" if name.isdigit() else "best"), name)
        _sync_directory(self.directory)
        self._prune(name)

    def _prune(self, newest: str) -> None:
        """Delete what is older than the `keep` newest, or than the best."""
        if newest.isdigit():
            old = self._names()[: -self.keep]
        else:
            old = [entry.name for entry in self.directory.glob("best-*") if entry.name != newest]
        for name in old:
            shutil.rmtree(self.directory / name, ignore_errors=True)
        self._sweep()

    def _on_rank_0(self, action: Callable[[], None]) -> str:
        """Do something on rank 0; tell every rank how it failed, or ""."""
        failure = ""
        if self.comm.rank == 0:
            try:
                action()
            except OSError as error:
                failure = f"rank 0: {error}"
        with self.timer.during("comm"):
            return self.comm.broadcast_object(failure)


def write_part(path: Path, content: Any, alive: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Write plain data with arrays for leaves as one safetensors file; return its `sha256` and `bytes`.

    Arrays go from where they are to the file, so that a replay shard needs no second copy in memory: the
    library's writer makes one. Hashing runs beside writing. `alive` is called after every block.

    Raises:
        OSError: the file cannot be written.
        TypeError: `content` is not plain data.
    """
    arrays: dict[str, NDArray[Any]] = {}
    data = _detach_arrays(content, arrays)
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
    blocks = [memoryview(struct.pack("<Q", len(encoded))), memoryview(encoded)]
    blocks += [_bytes_of(array) for array in arrays.values()]
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as hasher:
        for block in blocks:
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
    """What `write_part` wrote. Nothing in the file is ever executed.

    Arrays are views of the mapped file, read from the disk as they are touched: copy what is to outlive it.

    Raises:
        BrokenCheckpointError: it is no such file.
    """
    try:
        # Its torch framework maps the file; its numpy framework would copy each array.
        with safetensors.safe_open(path, framework="pt") as file:
            data = json.loads(file.metadata()["data"])
            return _attach_arrays(data, file)
    except _UNREADABLE as error:
        raise BrokenCheckpointError(f"{path} cannot be read: {error}") from None


_UNREADABLE = (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError)
_ARRAY, _DTYPE = "__array__", "__dtype__"


def _detach_arrays(content: Any, arrays: dict[str, NDArray[Any]]) -> Any:
    """JSON-able copy of `content`; arrays are moved to `arrays` and leave their name behind."""
    if isinstance(content, torch.Tensor):
        content = content.detach().cpu().numpy()
    if isinstance(content, np.generic):
        content = np.asarray(content)
    if isinstance(content, np.ndarray):
        return _detach_array(content, arrays)
    if isinstance(content, Mapping):
        return {str(key): _detach_arrays(value, arrays) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_detach_arrays(value, arrays) for value in content]
    if content is None or isinstance(content, (str, int, float)):
        return content
    raise TypeError(f"{type(content).__name__} is not plain data")


def _detach_array(array: NDArray[Any], arrays: dict[str, NDArray[Any]]) -> dict[str, str]:
    if array.dtype.kind not in "biufcSU":
        raise TypeError(f"an array of {array.dtype} is not plain data")
    name, dtype = str(len(arrays)), array.dtype.str
    # An empty or scalar array keeps its shape; a strided one is copied, replay's are not strided.
    array = np.ascontiguousarray(array).reshape(array.shape)
    if dtype in _DTYPES:
        arrays[name] = array
        return {_ARRAY: name}
    arrays[name] = array[..., None].view(
        np.uint8
    )  # complex numbers, text: the format knows them as bytes only
    return {_ARRAY: name, _DTYPE: dtype}


def _attach_arrays(data: Any, file: Any) -> Any:
    if isinstance(data, dict):
        if _ARRAY in data:
            array = file.get_tensor(data[_ARRAY]).numpy()
            return array.view(data[_DTYPE])[..., 0] if _DTYPE in data else array
        return {key: _attach_arrays(value, file) for key, value in data.items()}
    if isinstance(data, list):
        return [_attach_arrays(value, file) for value in data]
    return data


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


def _write_all(file: Any, view: memoryview) -> None:
    while len(view):
        view = view[file.write(view) :]


def _digest(path: Path, alive: Callable[[], None]) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
            alive()
    return digest.hexdigest(), size


def _manifest_text(manifest: Mapping[str, Any]) -> str:
    """The manifest as it stands in its file, its own digest last."""
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1)


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
