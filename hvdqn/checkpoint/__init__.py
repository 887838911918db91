"""Checkpoints of a training run, and how a run resumes from one.

- `files`: one file of a checkpoint, in safetensors format.
- `manifest`: one checkpoint, and how to open it.
- `directory`: the checkpoints of a run directory: saving, verifying, pruning.
- `policy_file`: the parameters by name, and what it takes to act with them.
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
from hvdqn.checkpoint.policy_file import (
    POLICY,
    SavedPolicy,
    find_checkpoint,
    load_parameters,
    policy_of,
    policy_part,
    read_policy,
)
from hvdqn.checkpoint.resume import best_evaluation, find_newest, reset_environments, restore

__all__ = [
    "LEARNER",
    "POLICY",
    "BrokenCheckpointError",
    "Checkpoint",
    "Checkpoints",
    "OtherFormatError",
    "Progress",
    "SavedPolicy",
    "best_evaluation",
    "check_learner",
    "contents",
    "find_checkpoint",
    "find_newest",
    "load_parameters",
    "load_shared_state",
    "open_checkpoint",
    "policy_of",
    "policy_part",
    "rank_part",
    "read_part",
    "read_policy",
    "reset_environments",
    "restore",
    "shared_state",
    "write_part",
]
