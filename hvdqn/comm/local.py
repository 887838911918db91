"""The engine of a single process: every collective is the identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from hvdqn.comm.base import Comm

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(slots=True)
class _Done:
    """The handle of an allreduce that has nothing to wait for."""

    tensor: Tensor

    def wait(self) -> Tensor:
        return self.tensor


class LocalComm(Comm):
    """A job with one rank."""

    name = "local"
    title = "nothing"

    def __init__(self) -> None:
        super().__init__(rank=0, size=1, local_rank=0, local_size=1)

    def allreduce_sum_async(self, tensor: Tensor, name: str) -> _Done:
        """See `Comm`."""
        return _Done(tensor)

    def broadcast_(self, tensor: Tensor, root: int = 0) -> None:
        """See `Comm`."""

    def broadcast_object(self, obj: T, root: int = 0) -> T:
        """See `Comm`."""
        return obj

    def all_gather_object(self, obj: T) -> list[T]:
        """See `Comm`."""
        return [obj]

    def split(self, color: int) -> LocalComm:
        """See `Comm`."""
        return LocalComm()

    def barrier(self) -> None:
        """See `Comm`."""

    def close(self) -> None:
        """See `Comm`."""
