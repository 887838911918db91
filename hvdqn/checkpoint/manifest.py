"""Open a checkpoint on disk, and verify its files by the hashes in its manifest."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hvdqn import __version__
from hvdqn.checkpoint.files import BrokenCheckpointError, file_digest, read_part
from hvdqn.config import check_saved
from hvdqn.errors import UserError
from hvdqn.links import follow_link

FORMAT = 2
MANIFEST = "manifest.json"

_FILE_NAME = re.compile(r"(learner|rank-\d{5,9})\.safetensors")
# These errors mean that a file is missing, so the checkpoint is broken. Other OSErrors may be temporary failures of the
# file system, such as a stale handle; after those the checkpoint may still be intact.
_MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


class UnreadablePartError(BrokenCheckpointError):
    """Raised for a checkpoint whose shared file is intact, but in which the file of a single rank cannot be read."""


class OtherFormatError(BrokenCheckpointError):
    """Raised for an intact checkpoint that another version of hvdqn wrote in another format."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose manifest has been read and verified.

    Args:
        path: the checkpoint's directory.
        manifest: the content of `manifest.json`, without its own hash.
        verified: True if the ranks have together compared every file with the manifest, so that `read` need not.
        unreadable: the reason if files of single ranks cannot be read, while the one that all ranks share can; else "".
    """

    path: Path
    manifest: Mapping[str, Any]
    verified: bool = False
    unreadable: str = ""

    @property
    def env_steps(self) -> int:
        """The global env steps at which the checkpoint was written."""
        return int(self.manifest["env_steps"])

    @property
    def world_size(self) -> int:
        """The number of ranks that wrote the checkpoint."""
        return int(self.manifest["world_size"])

    def verify(self, name: str, alive: Callable[[], None] = lambda: None) -> None:
        """Compare the hash and size of one file with the manifest.

        Args:
            name: name of the file, a key of the manifest's `files`.
            alive: called after each block that is read, so that the watchdog sees that the rank makes progress.

        Raises:
            BrokenCheckpointError: the file is missing, or its length or content differs.
            OSError: the file exists but cannot be read at the moment.
        """
        expected = self.manifest["files"][name]
        try:
            found = file_digest(self.path / name, alive)
        except _MISSING as error:
            raise BrokenCheckpointError(f"{self.path / name}: {error.strerror}") from None
        if found != (expected["sha256"], expected["bytes"]):
            raise BrokenCheckpointError(
                f"{self.path / name} is not what was written (sha256 or length differs)"
            )

    def read(self, part: str) -> Any:
        """Return the content that `Checkpoints.save` wrote to one file, as `read_part` returns it.

        Args:
            part: the file's name without ".safetensors", such as `LEARNER`.

        Raises:
            BrokenCheckpointError: the file is missing, differs from what was written, or cannot be read.
        """
        name = part + ".safetensors"
        if not self.verified:
            self.verify(name)
        return read_part(self.path / name)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read and verify the manifest of a checkpoint; return the checkpoint, whose `read` verifies the other files.

    Args:
        path: the checkpoint's directory, or a link to it.

    Raises:
        BrokenCheckpointError: the manifest is missing, incomplete or altered.
        OtherFormatError: the manifest is intact, but this version does not read its format.
    """
    path = follow_link(path)
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        manifest.pop("sha256")
        intact = text == manifest_text(manifest)
        version = manifest["format"]
    except (*_MISSING, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise BrokenCheckpointError(f"{path / MANIFEST} is missing or damaged") from None
    if not intact:
        raise BrokenCheckpointError(f"{path / MANIFEST} is not what was written (sha256 differs)")
    if version != FORMAT:
        raise OtherFormatError(f"{path} has format {version}, this version reads {FORMAT}")
    if problem := _problem_of(manifest):
        raise BrokenCheckpointError(f"{path / MANIFEST} is not a checkpoint's: {problem}")
    return Checkpoint(path, manifest)


def _problem_of(manifest: Mapping[str, Any]) -> str:
    """Return what is wrong with the entries of a manifest, or "". Its hash proves only that nobody changed it."""
    for name, least in (("env_steps", 0), ("world_size", 1)):
        value = manifest.get(name)
        if type(value) is not int or value < least:
            return f"{name} is not a whole number of {least} or more"
    files, config = manifest.get("files"), manifest.get("config")
    if not isinstance(files, dict) or not isinstance(config, dict):
        return "files or config is missing"
    for name, entry in files.items():
        if not _FILE_NAME.fullmatch(name):
            return f"{name!r} is not the name of a part"
        if not isinstance(entry, dict) or (type(entry.get("sha256")), type(entry.get("bytes"))) != (str, int):
            return f"{name} has no sha256 or no size in bytes"
    try:
        check_saved(config)
    except UserError as error:
        return f"config: {error}"
    return ""


def make_manifest(
    env_steps: int, world_size: int, config: Mapping[str, Any], files: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the manifest of a checkpoint, without the manifest's own hash.

    Args:
        env_steps: global env steps of the run.
        world_size: number of ranks.
        config: all settings of the run, by name.
        files: for each file name, what `write_part` returned.
    """
    return {
        "format": FORMAT,
        "env_steps": env_steps,
        "world_size": world_size,
        "versions": {
            "hvdqn": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "config": dict(config),
        "files": dict(files),
    }


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """Return the text of `manifest.json`: the manifest, and as its last entry the sha256 of the others."""
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1)
