"""Save, verify and delete the checkpoints of a run directory.

    checkpoints/000000050000/      env steps, zero-padded
        manifest.json              versions, config, number of ranks, size and sha256 of every file
        learner.safetensors        networks and optimizer, clock and counters (rank 0)
        rank-00000.safetensors     that rank's replay shard, random states and environments
    checkpoints/latest             link to the newest checkpoint
    checkpoints/best               link to the weights of the best evaluation

On a file system without symbolic links, `latest` and `best` are text files that hold the name.

`save` writes a checkpoint to a hidden directory, flushes it to disk and then renames it, so that a crash never leaves
half of one. Training waits during the write: replay must not change, and a copy of it would double the memory.
`summary.json` reports the time as phase `save`.
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

# The errors of `fsync` on a directory, on file systems that do not support it.
_UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EBADF)


class Checkpoints:
    """Manages the checkpoints of one run directory, which all ranks can read and write.

    All ranks must call each public method together, and get the same result.

    Args:
        directory: the path `RUN_DIR/checkpoints`.
        comm: the collectives over all ranks.
        keep: number of checkpoints to keep; older ones are deleted.
        timer: times the waits for other ranks; long reads and writes call its `alive`, so that the watchdog sees that
            they make progress.
    """

    def __init__(self, directory: Path, comm: Comm, keep: int, timer: PhaseTimer) -> None:
        self.directory, self.comm, self.keep, self.timer = directory, comm, keep, timer
        self._link_reported = False
        self._read_back: set[bool] = (
            set()
        )  # holds False once a regular checkpoint was read back after writing, True once a best one was

    def save(
        self, env_steps: int, parts: Mapping[str, Any], config: Mapping[str, Any], best: bool = False
    ) -> str:
        """Write a checkpoint, and return "". If any rank fails, return the reason; earlier checkpoints then stay.

        Args:
            env_steps: global env steps, after which the checkpoint's directory is named.
            parts: the content of each file that this rank writes, by the file's name without ".safetensors".
            config: the settings of the run, stored in the manifest.
            best: whether these are the weights of the best evaluation: the link `best` then points at this checkpoint,
                instead of `latest`.
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
        """Raise BrokenCheckpointError unless the file can be read back and has the hash and size in `entry`.

        `save` does this for the first checkpoint only, which shows whether the state of this run can be read at all.
        """
        if file_digest(path, self.timer.alive) != (entry["sha256"], entry["bytes"]):
            raise BrokenCheckpointError(f"{path} reads back as something else")
        read_part(path)

    def newest_valid(
        self, check: Callable[[Checkpoint, Sequence[str]], None] = lambda checkpoint, files: None
    ) -> tuple[Checkpoint | None, dict[str, str]]:
        """Return the newest checkpoint that is not broken, and the broken ones as a dict from name to reason.

        Each rank verifies its share of a checkpoint's files. A checkpoint in which only files of single ranks cannot be
        read is returned if no older one is complete.

        Args:
            check: called with a checkpoint and the names of this rank's share of its files, once their hashes are
                verified; raises BrokenCheckpointError if the content is wrong.

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
        """Open a checkpoint and verify this rank's share of its files; return it with the errors of all ranks."""
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
        """Rename broken checkpoints to `NAME.broken`, and point the link `latest` at the valid one that was found.

        Args:
            found: the checkpoint that `newest_valid` returned; None: remove the link `latest`.
            broken: the broken checkpoints that `newest_valid` returned; if there are none, this does nothing.
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
        """Return the names of all checkpoints, oldest first, without the best ones and the broken ones."""
        if not self.directory.is_dir():
            return []
        return sorted(entry.name for entry in self.directory.iterdir() if entry.name.isdigit())

    def _make_empty(self, temporary: Path) -> None:
        self._delete_temporary()
        temporary.mkdir(parents=True)

    def _restore_old(self) -> None:
        """Give a checkpoint its name back, if the run was killed while `_commit` was replacing it."""
        for old in self.directory.glob(".*.old.tmp"):
            replaced = self.directory / old.name.removeprefix(".").removesuffix(".old.tmp")
            if not replaced.exists():
                old.rename(replaced)

    def _delete_temporary(self) -> None:
        """Delete the directories that saves left when they failed or were killed."""
        self._restore_old()
        for path in self.directory.glob(".*.tmp"):
            shutil.rmtree(path, ignore_errors=True)

    def _commit(self, temporary: Path, name: str, manifest: Mapping[str, Any]) -> None:
        """Write the manifest beside the files in `temporary`, then rename that directory to its final name.

        So a checkpoint appears whole or not at all. Then update `latest` or `best`, and delete old checkpoints.
        """
        with (temporary / MANIFEST).open("w", encoding="utf-8") as file:
            file.write(manifest_text(manifest))
            file.flush()
            os.fsync(file.fileno())
        _fsync_directory(temporary)
        final = self.directory / name
        if name.isdigit() and final.exists():
            final.rename(self.directory / f".{name}.old.tmp")  # `_restore_old` brings it back after a crash
        # A resumed run repeats evaluations, so a best checkpoint may come twice at the same env step. The second one
        # gets another name, so that the link `best` is valid at any moment.
        number = 2
        while final.exists():
            final, number = self.directory / f"{name}-{number}", number + 1
        temporary.rename(final)
        linked = self._link("latest" if name.isdigit() else "best", final.name)
        _fsync_directory(self.directory)
        self._prune(final.name, linked)

    def _link(self, link: str, target: str) -> bool:
        """Point the link `latest` or `best` at the checkpoint `target`; log a failure, and then return False."""
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
        """Delete the checkpoints that the one just saved replaces.

        These are all regular ones but the `keep` newest if it is a regular one, or all other best ones if it is one.

        Args:
            newest: the name of the checkpoint that was just saved.
            linked: whether `latest` or `best` points at it. If not, no best one is deleted, since `best` still points
                at an older one.
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
        """Call `action` on rank 0; return on all ranks the reason if it raised an OSError, else ""."""
        failure = ""
        if self.comm.rank == 0:
            try:
                action()
            except OSError as error:
                failure = f"rank 0: {error}"
        with self.timer.during("comm"):
            return self.comm.broadcast_object(failure)


def _fsync_directory(path: Path) -> None:
    """Flush a directory's entries to disk; do nothing on file systems that do not support it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
