"""Save checkpoints of a training run, and resume a run from one.

- `files`: writes and reads one file of a checkpoint, in safetensors format.
- `manifest`: opens one checkpoint; its manifest lists the files with their hashes.
- `directory`: saves, verifies and deletes the checkpoints of a run directory.
- `policy_file`: writes and reads the parameters of the network by name, and what it takes to act with them.
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
