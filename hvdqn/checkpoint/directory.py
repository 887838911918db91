"""The checkpoints of a run directory: complete or absent, checksummed, without pickle.

    checkpoints/000000050000/      env steps, zero-padded
        manifest.json              versions, config, world size, size and sha256 of every file
        learner.safetensors        networks and optimizer, clock and counters (rank 0)
        rank-00000.safetensors     that rank's replay shard, random states and environments
    checkpoints/latest             link to the newest checkpoint
    checkpoints/best               link to the weights of the best evaluation

On a file system without symbolic links, `latest` and `best` are text files that hold the name.

A checkpoint is written to a hidden directory, flushed to disk and then renamed, so that a crash never leaves half of
one. Training waits during the write: replay must not change, and a copy of it would double the memory. The time it
takes is phase `save` in `summary.json`.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hvdqn.checkpoint.files import BrokenCheckpointError, file_digest, read_part, write_part
from hvdqn.checkpoint.manifest import (
    MANIFEST,
    Checkpoint,
    OtherFormatError,
    UnreadablePartError,
    make_manifest,
    manifest_text,
    open_checkpoint,
)
from hvdqn.comm import Comm
from hvdqn.links import write_link
from hvdqn.metrics import PhaseTimer

log = logging.getLogger(__name__)

# What file systems without fsync of directories answer.
_UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EBADF)


class Checkpoints:
    """The checkpoints of one run directory, which all ranks can read and write.

    Every public method is collective: all ranks call it together and get the same result.

    Args:
        directory: `RUN_DIR/checkpoints`.
        comm: the ranks.
        keep: number of checkpoints to keep; older ones are deleted.
        timer: times the waits for other ranks, and shows the watchdog that long reads and writes make progress.
    """

    def __init__(self, directory: Path, comm: Comm, keep: int, timer: PhaseTimer) -> None:
        self.directory, self.comm, self.keep, self.timer = directory, comm, keep, timer
        self._link_reported = False
        self._read_back: set[bool] = (
            set()
        )  # the kinds of checkpoints, `best` or not, that were read back once

    def save(
        self, env_steps: int, parts: Mapping[str, Any], config: Mapping[str, Any], best: bool = False
    ) -> str:
        """Write a checkpoint; return "", or the reason if any rank failed, and then leave the others as they are.

        Args:
            env_steps: global env steps, which name the checkpoint's directory.
            parts: content of each file that this rank writes, by the file's name without its suffix.
            config: the settings of the run, stored in the manifest.
            best: point the link `best` at this checkpoint instead of the link `latest`.
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
                if best not in self._read_back:
                    self._check_written(temporary / file, files[file])
        except (OSError, TypeError, ValueError, BrokenCheckpointError) as error:
            failure = f"rank {self.comm.rank}: {error}"
        with self.timer.during("comm"):
            reports = self.comm.all_gather_object((failure, files))
        failure = next((text for text, _ in reports if text), "")
        if not failure:
            all_files = {file: entry for _, written in reports for file, entry in written.items()}
            manifest = make_manifest(env_steps, self.comm.size, config, all_files)
            failure = self._on_rank_0(lambda: self._commit(temporary, name, manifest))
        if failure:
            self._on_rank_0(self._delete_temporary)
        else:
            self._read_back.add(best)
        return failure

    def _check_written(self, path: Path, entry: Mapping[str, Any]) -> None:
        """Read a file back. The first checkpoint shows whether the state of this run can be read at all."""
        if file_digest(path, self.timer.alive) != (entry["sha256"], entry["bytes"]):
            raise BrokenCheckpointError(f"{path} reads back as something else")
        read_part(path)

    def newest_valid(
        self, check: Callable[[Checkpoint, Sequence[str]], None] = lambda checkpoint, files: None
    ) -> tuple[Checkpoint | None, dict[str, str]]:
        """Return the newest checkpoint that is not broken, and the broken ones.

        Each rank verifies its share of a checkpoint's files. The broken ones map their name to what is wrong. If only
        parts of ranks cannot be read, older checkpoints are preferred; if there is none, that checkpoint is returned.

        Args:
            check: checks the content of a checkpoint after its digests, by the names of a share of its files; raises
                BrokenCheckpointError.

        Raises:
            OtherFormatError: on all ranks, if a checkpoint has a format that this version does not read.
        """
        broken: dict[str, str] = {}
        partial: Checkpoint | None = None
        self._on_rank_0(self._restore_old)
        names = self.comm.broadcast_object(self._names() if self.comm.rank == 0 else [])
        for name in reversed(names):
            found, errors = self._verify_together(name, check)
            if found is not None and not errors:
                return replace(found, verified=True), broken
            broken[name] = str(errors[0])
            if found is not None and partial is None and all(type(e) is UnreadablePartError for e in errors):
                partial = replace(found, verified=True, unreadable=broken[name])
        if partial is not None:
            del broken[partial.path.name]
        return partial, broken

    def _verify_together(
        self, name: str, check: Callable[[Checkpoint, Sequence[str]], None]
    ) -> tuple[Checkpoint | None, list[BrokenCheckpointError]]:
        """Open a checkpoint, and verify this rank's share of its files; return what any rank found wrong."""
        found, error = None, None
        try:
            found = open_checkpoint(self.directory / name)
            files = sorted(found.manifest["files"])[self.comm.rank :: self.comm.size]
            for file in files:
                found.verify(file, self.timer.alive)
            check(found, files)
        except BrokenCheckpointError as caught:
            error = caught
        with self.timer.during("comm"):
            errors = [one for one in self.comm.all_gather_object(error) if one]
        for one in errors:
            if isinstance(one, OtherFormatError):
                raise one
        return found, errors

    def set_aside_broken(self, found: Checkpoint | None, broken: Mapping[str, str]) -> None:
        """Rename broken checkpoints to `NAME.broken` and point `latest` at the valid one that was found.

        Args:
            found: the checkpoint that `newest_valid` returned; without one, `latest` is removed.
            broken: the broken checkpoints that it returned; without any, nothing changes.
        """
        if broken:
            self._on_rank_0(lambda: self._set_aside_broken(found, broken))

    def _set_aside_broken(self, found: Checkpoint | None, broken: Mapping[str, str]) -> None:
        for name in broken:
            aside = self.directory / f"{name}.broken"
            shutil.rmtree(aside, ignore_errors=True)
            (self.directory / name).rename(aside)
        latest = self.directory / "latest"
        if found is None:
            latest.unlink(missing_ok=True)
        else:
            self._link("latest", found.path.name)

    def _names(self) -> list[str]:
        """Return the names of all checkpoints but the best and the broken ones, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(entry.name for entry in self.directory.iterdir() if entry.name.isdigit())

    def _make_empty(self, temporary: Path) -> None:
        self._delete_temporary()
        temporary.mkdir(parents=True)

    def _restore_old(self) -> None:
        """Bring back a checkpoint that was about to be replaced when the run was killed."""
        for old in self.directory.glob(".*.old.tmp"):
            replaced = self.directory / old.name.removeprefix(".").removesuffix(".old.tmp")
            if not replaced.exists():
                old.rename(replaced)

    def _delete_temporary(self) -> None:
        """Delete what killed or failed attempts to save have left."""
        self._restore_old()
        for path in self.directory.glob(".*.tmp"):
            shutil.rmtree(path, ignore_errors=True)

    def _commit(self, temporary: Path, name: str, manifest: Mapping[str, Any]) -> None:
        """Add the manifest to the files that are written, and give the checkpoint its name."""
        with (temporary / MANIFEST).open("w", encoding="utf-8") as file:
            file.write(manifest_text(manifest))
            file.flush()
            os.fsync(file.fileno())
        _fsync_directory(temporary)
        final = self.directory / name
        if name.isdigit() and final.exists():
            final.rename(self.directory / f".{name}.old.tmp")  # `_restore_old` brings it back after a crash
        # A run that resumes repeats an evaluation at the same env step, and may write a better `best` then. It gets a
        # name of its own, so that the link is valid at any moment.
        number = 2
        while final.exists():
            final, number = self.directory / f"{name}-{number}", number + 1
        temporary.rename(final)
        linked = self._link("latest" if name.isdigit() else "best", final.name)
        _fsync_directory(self.directory)
        self._prune(final.name, linked)

    def _link(self, link: str, target: str) -> bool:
        """Point `latest` or `best` at a checkpoint; return False if that failed, which does not fail the save."""
        place, line = self.directory / link, ""
        linked = True
        try:
            if not write_link(place, target):
                line = (
                    f"the file system of '{self.directory}' has no symbolic links: latest and best are text files "
                    f"there, with the name of the checkpoint"
                )
        except OSError as error:
            line, linked = f"'{place}' cannot be written: {error}; the checkpoint itself is complete", False
        if line and not self._link_reported:
            self._link_reported = True
            log.warning(line)
        return linked

    def _prune(self, newest: str, linked: bool) -> None:
        """Delete all but the `keep` newest checkpoints, or all best ones but the newest, whichever was saved.

        Args:
            newest: the name of the checkpoint that was saved.
            linked: whether `latest` or `best` points at it; otherwise `best` needs the one that it points at.
        """
        old: list[str] = []
        if newest.isdigit():
            old = self._names()[: -self.keep]
        elif linked:
            old = [entry.name for entry in self.directory.glob("best-*") if entry.name != newest]
        for name in old:
            shutil.rmtree(self.directory / name, ignore_errors=True)
        self._delete_temporary()

    def _on_rank_0(self, action: Callable[[], None]) -> str:
        """Call `action` on rank 0; return "" on all ranks, or the reason if it failed."""
        failure = ""
        if self.comm.rank == 0:
            try:
                action()
            except OSError as error:
                failure = f"rank 0: {error}"
        with self.timer.during("comm"):
            return self.comm.broadcast_object(failure)


def _fsync_directory(path: Path) -> None:
    """Flush a directory to disk, except on file systems that do not support it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
