"""Collect the state that a checkpoint holds: one file for what is equal on all ranks, and one file for each rank.

A file of a checkpoint is called a part; its name is the file's without ".safetensors".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvdqn.checkpoint.files import BrokenCheckpointError
from hvdqn.comm import Comm
from hvdqn.learner import load_tensors
from hvdqn.networks import QNetwork
from hvdqn.rank import Parts
from hvdqn.seeds import torch_state
from hvdqn.sync import Totals

LEARNER = "learner"
"""Name of the part (file) that rank 0 writes for all ranks."""


def rank_part(rank: int) -> str:
    """Return the name of the part (file) that this rank writes for itself: "rank-00003"."""
    return f"rank-{rank:05d}"


@dataclass
class Progress:
    """Counters and decisions of a run that are kept nowhere else. A resumed run continues with them."""

    failed_checkpoints: int = 0
    evaluated_at_env_steps: int = -1
    evaluation: dict[str, float] = field(default_factory=dict)
    keeps_replay: bool | None = None  # whether checkpoints hold replay; None until that is decided
    world_changes: int = 0  # only elastic runs have any


def shared_state(parts: Parts, totals: Totals, progress: Progress) -> dict[str, Any]:
    """Return the state of the job: networks, optimizer, counters, clock and progress. All ranks must call it together.

    Its tensors are those of the parts, not copies. It is equal on all ranks, but where ranks hold one network between
    them, only rank 0 gets the networks.
    """
    strategy, buffers = parts.strategy, parts.learner.buffers
    carried = {f"sync.{name}": tensor for name, tensor in strategy.state().items()}
    return {
        "learner": {**strategy.learner_state(), **carried},
        **({"buffers": buffers} if buffers else {}),
        "counters": {
            **totals.counters(),
            "skipped_in_a_row": strategy.skipped_in_a_row,
            "sync": strategy.counters(),
        },
        "clock": parts.clock.state(),
        "progress": asdict(progress),
    }


def load_shared_state(
    state: Mapping[str, Any], parts: Parts, totals: Totals, refill: bool = False
) -> Progress:
    """Load what `shared_state` returned into `parts` and `totals`; return its progress.

    Args:
        state: the state of another rank, or of a checkpoint, which holds NumPy arrays in place of tensors.
        parts: this rank's parts, built with the same settings of network and optimizer.
        totals: this rank's sums of statistics.
        refill: whether replay is empty, so that it must fill before the next update.
    """
    tensors = {name: torch.as_tensor(values) for name, values in state["learner"].items()}
    prefix = "sync."
    carried = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    counters, strategy = state["counters"], parts.strategy
    strategy.load_learner_state(tensors)
    if "buffers" in state:
        buffers = {name: torch.as_tensor(values) for name, values in state["buffers"].items()}
        load_tensors(parts.learner.buffers, buffers)
    strategy.load_state(carried)
    totals.load_counters(counters)
    strategy.skipped_in_a_row = counters["skipped_in_a_row"]
    strategy.load_counters(counters["sync"])
    parts.clock.resume(state["clock"], refill)
    return Progress(**state["progress"])


def check_learner(part: Any, path: object) -> None:
    """Check that the content of a checkpoint's file has a learner's tensors, with shapes that fit each other.

    The hash of the file does not prove that.

    Args:
        part: the content of the part `LEARNER`, as `read_part` returned it.
        path: the checkpoint's directory, for error messages.

    Raises:
        BrokenCheckpointError: the network's parameters are missing, or the tensors do not fit each other.
    """
    tensors = part.get("learner") if isinstance(part, dict) else None
    network = tensors.get("online", tensors.get("target")) if isinstance(tensors, dict) else None
    shape = _shape(network)
    if not isinstance(tensors, dict) or not shape or (isinstance(shape, tuple) and len(shape) != 1):
        raise BrokenCheckpointError(f"{path} holds no parameters of a network")
    for name, tensor in tensors.items():
        found = _shape(tensor)
        if found is None:
            raise BrokenCheckpointError(f"{path}: {name} is no array of floats")
        is_scalar = found == () or name == "sync.largest_weight"  # `--sync parameters` keeps that one
        if not is_scalar and found != shape:
            raise BrokenCheckpointError(f"{path}: {name} has shape {found}, where the network has {shape}")


def _shape(tensor: Any) -> tuple[int, ...] | dict[str, Any] | None:
    """Return the shape of an array of floats, or the shapes of arrays by name; None for anything else."""
    if isinstance(tensor, dict):
        shapes = {name: _shape(part) for name, part in tensor.items()}
        return None if None in shapes.values() else shapes
    return tensor.shape if isinstance(tensor, np.ndarray) and tensor.dtype.kind == "f" else None


def contents(parts: Parts, comm: Comm, totals: Totals, progress: Progress) -> dict[str, Any]:
    """Return the content of each part (file) that this rank writes to a checkpoint, by the part's name."""
    acting = parts.acting if progress.keeps_replay else None  # without replay, a resume resets environments
    written: dict[str, Any] = {
        rank_part(comm.rank): {
            "actor": acting.actor.state() if acting else None,
            "clock": parts.clock.own_state(),
            "replay": acting.replay.state() if acting else None,
            "seconds": parts.timer.seconds(),
            "torch": torch_state(parts.device),
        }
    }
    shared = shared_state(parts, totals, progress)
    if comm.rank == 0:
        flat = shared["learner"].pop("online")  # a file of its own has it, see `policy_file`
        for name, tensor in shared["learner"].items():
            if tensor.shape == flat.shape:
                shared["learner"][name] = parts.learner.online.by_name(tensor)
        written[LEARNER] = shared
    return written


def flat_learner(
    tensors: Mapping[str, Any], parameters: Mapping[str, Any], network: QNetwork
) -> dict[str, Any]:
    """Return the tensors of a checkpoint as `load_shared_state` takes them.

    Args:
        tensors: the learner's tensors in the part that all ranks share, by name of each parameter.
        parameters: the parameters of the online network, by name.
        network: the network that they are for.

    Raises:
        ValueError: the network has other parameters.
    """
    shapes = network.whole_shapes()
    named = {"online": parameters, **tensors}
    return {
        name: _flat(value, shapes, name) if isinstance(value, Mapping) else value
        for name, value in named.items()
    }


def _flat(named: Mapping[str, Any], shapes: Mapping[str, torch.Size], what: str) -> Tensor:
    for name in [*shapes, *named]:
        if name not in named or name not in shapes or named[name].shape != tuple(shapes[name]):
            raise ValueError(f"{what} has other parameters: {name}")
    return torch.cat([torch.as_tensor(named[name]).reshape(-1) for name in shapes])
