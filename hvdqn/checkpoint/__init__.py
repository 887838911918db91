"""Checkpoints of a training run, and how a run resumes from one.

- `files`: one file of a checkpoint, in safetensors format.
- `manifest`: one checkpoint, and how to open it.
- `directory`: the checkpoints of a run directory: saving, verifying, pruning.
- `contents`: which state a checkpoint holds.
- `resume`: finding a checkpoint and restoring the state in it.
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
