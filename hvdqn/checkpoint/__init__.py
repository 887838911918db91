"""Save checkpoints of a training run, and resume a run from one.

- `files`: writes and reads one file of a checkpoint, in safetensors format.
- `manifest`: opens one checkpoint; its manifest lists the files with their hashes.
- `directory`: saves, verifies and deletes the checkpoints of a run directory.
- `contents`: collects the state that a checkpoint holds.
- `resume`: finds the checkpoint to resume from, and restores the state in it.
"""

from hvdqn.checkpoint.contents import (
    LEARNER,
    Progress,
    check_learner,
    contents,
    load_shared_state,
    rank_part,
    shared_state,
)
from hvdqn.checkpoint.directory import Checkpoints
from hvdqn.checkpoint.files import BrokenCheckpointError, read_part, write_part
from hvdqn.checkpoint.manifest import Checkpoint, OtherFormatError, open_checkpoint
from hvdqn.checkpoint.resume import best_evaluation, find_checkpoint, reset_environments, restore

__all__ = [
    "LEARNER",
    "BrokenCheckpointError",
    "Checkpoint",
    "Checkpoints",
    "OtherFormatError",
    "Progress",
    "best_evaluation",
    "check_learner",
    "contents",
    "find_checkpoint",
    "load_shared_state",
    "open_checkpoint",
    "rank_part",
    "read_part",
    "reset_environments",
    "restore",
    "shared_state",
    "write_part",
]
