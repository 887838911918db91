"""Run a job with a single process: every collective returns its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from hvdqn.comm.base import Comm

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(slots=True)
class _Done:
    """The handle of an allreduce over one rank, which is complete at once."""

    tensor: Tensor

    def wait(self) -> Tensor:
        return self.tensor


class LocalComm(Comm):
    """Implements `Comm` for a job with one rank."""

    name = "local"

    def __init__(self) -> None:
        super().__init__(rank=0, size=1, local_rank=0, local_size=1)

    def allreduce_sum_async(self, tensor: Tensor, name: str) -> _Done:
        """Return a handle whose `wait` returns `tensor` unchanged: a single rank's sum is its own tensor."""
        return _Done(tensor)

    def broadcast_(self, tensor: Tensor, root: int = 0) -> None:
        """Do nothing: the only rank already has its own tensor."""

    def broadcast_object(self, obj: T, root: int = 0) -> T:
        """Return `obj`, the object of the only rank."""
        return obj

    def all_gather_object(self, obj: T) -> list[T]:
        """Return a list with the object of the only rank."""
        return [obj]

    def barrier(self) -> None:
        """Do nothing: there are no ranks to wait for."""

    def close(self) -> None:
        """Do nothing: there is no connection to close."""
