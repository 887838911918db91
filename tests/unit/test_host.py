"""What ranks of one host share: signals between real processes, and memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvdqn.comm import host
from hvdqn.comm.host import Place, Signals, make_memory, map_memory, place_of
from hvdqn.errors import PeerLostError


def stay(folder: Path, ready: multiprocessing.synchronize.Event) -> None:
    """Be rank 1 of 2 until killed."""
    signals = Signals(folder, 1, 2)
    ready.set()
    signals.wait(0, [0])


@contextlib.contextmanager
def a_peer(folder: Path) -> Iterator[multiprocessing.process.BaseProcess]:
    """Start rank 1 in a process of its own; kill it at the end."""
    Signals.make(folder, 2)
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=stay, args=(folder, ready))
    process.start()
    try:
        assert ready.wait(60)
        yield process
    finally:
        process.kill()
        process.join()


def test_a_rank_that_waits_for_a_killed_one_raises(tmp_path: Path) -> None:
    with a_peer(tmp_path) as process:
        signals = Signals(tmp_path, 0, 2)
        killer = threading.Timer(1.5, os.kill, [process.pid, signal.SIGKILL])
        killer.start()
        began = time.monotonic()
        with pytest.raises(PeerLostError):
            signals.wait(0, [1])
        assert not killer.is_alive(), "the rank was thought dead while it lived"
        assert time.monotonic() - began < 30
        signals.close()


def test_signals_of_different_numbers_do_not_mix(tmp_path: Path) -> None:
    Signals.make(tmp_path, 3)
    ranks = [Signals(tmp_path, index, 3) for index in range(3)]
    ranks[0].send(4, [1, 2])
    ranks[0].send(0, [1])
    ranks[0].send(4, [1])
    ranks[2].send(0, [1])
    for number, peers in ((0, [0, 2]), (4, [0]), (4, [0])):
        ranks[1].wait(number, peers)
    ranks[2].wait(4, [0])
    assert not any(any(received) for rank in ranks for received in rank._received)
    for rank in ranks:
        rank.close()


def test_a_rank_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    before = set(Path("/dev/fd").iterdir())
    with pytest.raises(FileNotFoundError):
        Signals(tmp_path, 0, 2)
    assert set(Path("/dev/fd").iterdir()) == before


def test_memory_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "SHARED_MEMORY", tmp_path)
    before = set(Path("/dev/fd").iterdir())
    with pytest.raises(OSError, match=r"large|space"):
        make_memory(1 << 60)
    assert set(Path("/dev/fd").iterdir()) == before
    with pytest.raises(FileNotFoundError):
        map_memory(Place(str(tmp_path / "none"), 0, 0))


def test_memory_is_shared_and_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "SHARED_MEMORY", tmp_path)
    descriptor = make_memory(100)
    place = place_of(descriptor)
    first, second = map_memory(place), map_memory(place)
    assert list(tmp_path.iterdir()) == []
    first[7] = 42
    assert (len(second), second[7]) == (100, 42)
    other = make_memory(100)
    with pytest.raises(FileNotFoundError, match="not shared"):  # another process may have that number
        map_memory(place._replace(path=place_of(other).path))
    os.close(descriptor)
    os.close(other)
