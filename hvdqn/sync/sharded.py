"""Model parallelism beside data parallelism: groups of ranks hold one network between them.

The world of N ranks is N / M groups of M neighbors. Ranks with the same place in their groups are peers: they hold the
same part of the network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hvdqn.comm import Comm, Handle
from hvdqn.learner import Learner
from hvdqn.metrics import PhaseTimer
from hvdqn.networks import Layout, QNetwork
from hvdqn.sync.gradients import Gradients
from hvdqn.sync.strategy import minority


class RankGroup:
    """The ranks that hold one network with this one, as `networks.Group` asks for them.

    Making one is a collective call of all ranks.

    Args:
        comm: all ranks.
        size: M, ranks of a group; it divides the number of ranks.
        timer: counts the seconds that this rank waits for others.

    Attributes:
        peers: the ranks with the same place in their groups.
        sent_bytes: payload that this rank has summed and gathered in the group.
    """

    def __init__(self, comm: Comm, size: int, timer: PhaseTimer) -> None:
        self.index, self.size, self.timer = comm.rank % size, size, timer
        self.comm = comm.split(comm.rank // size)
        self.peers = comm.split(comm.rank % size)
        self.sent_bytes = 0
        self._gathered: tuple[Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> RankGroup:
        """Return the group itself: copies of a network are held by the same ranks."""
        return self

    def close(self) -> None:
        """Disconnect the groups; a collective call of all ranks."""
        self.comm.close()
        self.peers.close()

    def allreduce_sum(self, tensor: Tensor) -> Tensor:
        """Overwrite a contiguous tensor of any shape with its sum over the group, and return it."""
        self.sent_bytes += tensor.nbytes
        # One name for each length: engines keep buffers and negotiations by name.
        name = f"group.{tensor.numel()}.{tensor.element_size()}"
        with self.timer.during("comm"):
            self.comm.allreduce_sum_async(tensor.detach().view(-1), name).wait()
        return tensor

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all ranks in order, `[size x rows, ...]`; every rank gives equally many.

        What was gathered last is kept: Double DQN passes the next observation through both networks.
        """
        if self._gathered is not None and self._gathered[0] is rows:
            return self._gathered[1]
        whole = rows.new_zeros((self.size, *rows.shape))
        whole[self.index] = rows
        if rows.dtype in (torch.float32, torch.float64):
            self.allreduce_sum(whole)  # a row plus zeros is that row
        else:
            self.sent_bytes += rows.nbytes
            with self.timer.during("comm"):
                for index in range(self.size):
                    self.comm.broadcast_(whole[index], index)
        gathered = whole.flatten(0, 1)
        self._gathered = (rows, gathered)
        return gathered

    def assemble(self, layout: Layout, flat: Tensor, wanted: bool = True) -> Tensor:
        """Return the flat tensor of the whole network on the host, `[full_numel]`; a collective call of the group.

        Args:
            layout: of the network.
            flat: this rank's parts.
            wanted: whether this rank wants the result; else it gets an empty tensor.
        """
        full = torch.empty(layout.full_numel if wanted else 0, dtype=flat.dtype)
        for index in range(self.size):
            part = flat[: layout.split_numel].clone()
            with self.timer.during("comm"):
                self.comm.broadcast_(part, index)
            if wanted:
                layout.place_split(part, index, full)
        if wanted:
            layout.place_common(flat[layout.split_numel :], full)
        return full


class GroupNorm:
    """The norm of the gradient of a network that is split over a group; equal bits on all ranks.

    Squares of split parameters are summed over the group, those of parameters that every rank holds count once.

    Args:
        group: the ranks that hold the network.
        split_numel: numbers of split parameters, which come first in the flat gradient.
    """

    def __init__(self, group: RankGroup, split_numel: int) -> None:
        self.group, self.split_numel = group, split_numel

    def __call__(self, gradient: Tensor) -> Tensor:
        """Return the norm `[]`; a collective call of the group."""
        split, common = gradient[: self.split_numel], gradient[self.split_numel :]
        square = torch.linalg.vector_norm(split, dtype=torch.float64).square().view(1)
        self.group.allreduce_sum(square)
        total: Tensor = square[0] + torch.linalg.vector_norm(common, dtype=torch.float64).square()
        return total.sqrt()


class ShardedGradients(Gradients):
    """Averages split parameters' gradients over peers, and the others' with the trailer over all ranks.

    Each rank holds the gradient of its whole group's minibatches (see `networks.passes.GroupPasses`), scaled by
    1 / ranks: the sum over peers is the average over all ranks. Gradients of parameters that every rank holds are
    summed over all ranks, so that these parameters stay equal bit for bit, whatever the ranks of a group round
    differently; each group counts M times there, and is divided by M.

    Args:
        learner: of a network that is split over the group.
        comm: all ranks.
        timer: counts the seconds that this rank waits for others.
        max_skipped_updates: updates skipped in a row before the run ends.
        group: the ranks that hold the network.
    """

    slots = 3
    """Between those of `Gradients` is the loss, which shows whose minibatch made the gradient of a group NaN."""

    def __init__(
        self, learner: Learner, comm: Comm, timer: PhaseTimer, max_skipped_updates: int, group: RankGroup
    ) -> None:
        super().__init__(learner, comm, timer, max_skipped_updates)
        self.group, self.peers, self.layout = group, group.peers, Layout(learner.online, group)
        split = self.layout.split_numel
        self.split_gradient, self.message = self.message[:split], self.message[split:]
        self.common_gradient = learner.gradient[split:]
        self.split_handle: Handle | None = None

    @property
    def description(self) -> str:  # type: ignore[override]
        """How ranks agree, for the header of a run."""
        size = self.group.size
        return (
            f"gradients averaged at every update; each {size} ranks hold one network, "
            f"{self.learner.parameters.numel():,} parameters a rank"
        )

    def launch(
        self, reported: Sequence[float], learned: Tensor | None, largest_weight: float, progress: float
    ) -> None:
        """Launch the allreduces of the split parameters' gradient, and of the others' with the trailer."""
        assert learned is not None, "a rank that has nothing to learn from would leave its group waiting"
        self.progress = progress
        self.common_gradient.div_(self.group.size)
        self.trailer.pack(reported, (largest_weight, float(learned[0])), learned)
        self.exchanged_updates += 1
        self.sent_messages += 2 if self.peers.size > 1 else 1
        self.sent_bytes += self._message_bytes()
        if self.peers.size > 1:
            self.split_handle = self.peers.allreduce_sum_async(self.split_gradient, name="split gradient")
        self.handle = self.comm.allreduce_sum_async(self.message, name="gradient")

    def update_target(self) -> list[int]:
        """Copy the weights of the first rank that holds each part to all target networks; compare them."""
        learner, split = self.learner, self.layout.split_numel
        incoming = learner.parameters.clone()
        with self.timer.during("comm"):
            self.peers.broadcast_(incoming[:split])
            self.comm.broadcast_(incoming[split:])
            same = torch.equal(incoming.view(torch.uint8), learner.parameters.view(torch.uint8))
            all_same = all(self.comm.all_gather_object(same))
        if learner.target_tau == 1.0:
            learner.update_target(incoming)
        return [] if all_same else self._compare([learner.parameters])

    def differing_ranks(self) -> list[int]:
        """Return the ranks whose parts of the networks or moments differ from those of most ranks that hold them."""
        # With a dimension more, a buffer counts as a tensor that every rank holds.
        buffers = [buffer[None] for buffer in self.learner.buffers.values()]
        return self._compare([*self.learner.state().values(), *buffers])

    def expected_traffic(self) -> tuple[float, float]:
        """Return the messages and bytes of gradients that one rank should send per update."""
        return (2.0 if self.peers.size > 1 else 1.0), float(self._message_bytes())

    def learner_state(self) -> dict[str, Tensor]:
        """Return the state of a whole network's learner on rank 0, and nothing on the others; a collective call."""
        if self.comm.rank >= self.group.size:
            return {}
        wanted = self.comm.rank == 0
        state = self.learner.state()
        flat = {name for name, tensor in state.items() if tensor.ndim == 1}
        whole = {
            name: self.group.assemble(self.layout, tensor, wanted) if name in flat else tensor
            for name, tensor in state.items()
        }
        return whole if wanted else {}

    def load_learner_state(self, state: Mapping[str, Tensor]) -> None:
        """Load this rank's parts of the state of a whole network."""
        parts = {
            name: self.layout.extract(tensor) if tensor.ndim == 1 else tensor
            for name, tensor in state.items()
        }
        self.learner.load_state(parts)

    def whole_network(self) -> QNetwork:
        """Return a copy of the online network that is not split, to play with; a collective call."""
        learner = self.learner
        full = self.group.assemble(self.layout, learner.parameters)
        return learner.online.whole(full.to(learner.device))

    def param_sha256(self) -> str:
        """Return the digest of the whole network's parameters; a collective call."""
        full = self.group.assemble(self.layout, self.learner.parameters, wanted=self.group.index == 0)
        return self.comm.broadcast_object(self.learner.sha256(full))

    def close(self) -> None:
        """Leave the groups; a collective call."""
        self.group.close()

    def _wait_for_sum(self) -> None:
        """Wait until the split parameters' gradient and the message hold their sums."""
        self.timer.start("comm")
        if self.split_handle is not None:
            self.split_handle.wait()
            self.split_handle = None
        super()._wait_for_sum()

    def _message_bytes(self) -> int:
        return self.message.nbytes + (self.split_gradient.nbytes if self.peers.size > 1 else 0)

    def _compare(self, tensors: Sequence[Tensor]) -> list[int]:
        """Return the ranks whose split parts differ from most of their peers', or whose other ones from most ranks'."""
        split, size = self.layout.split_numel, self.group.size
        digests = (hashlib.sha256(), hashlib.sha256())
        for tensor in tensors:
            flat = tensor.reshape(-1)
            parts = (flat[:split], flat[split:]) if tensor.ndim == 1 else (flat[:0], flat)
            for digest, part in zip(digests, parts, strict=True):
                digest.update(part.cpu().numpy().tobytes())
        with self.timer.during("comm"):
            everyone = self.comm.all_gather_object([digest.hexdigest() for digest in digests])
        differing = set(minority([common for _, common in everyone]))
        for place in range(size):
            peers = minority([split_part for split_part, _ in everyone[place::size]])
            differing.update(place + size * peer for peer in peers)
        return sorted(differing)
