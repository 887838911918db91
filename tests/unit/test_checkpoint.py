"""What is written is read back, and what is broken is found."""

from __future__ import annotations

import errno
import json
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import torch

from hvdqn import checkpoint
from hvdqn.checkpoint import (
    BrokenCheckpointError,
    Checkpoints,
    OtherFormatError,
    open_checkpoint,
    rank_part,
    read_part,
    write_part,
)
from hvdqn.comm import connect
from hvdqn.metrics import PhaseTimer

CONTENT = {
    "learner": {"online": torch.arange(6, dtype=torch.float32), "step": torch.tensor(7.0)},
    "clock": {"env_steps": 40, "updates": 3},
    "rng": {"state": 2**127 + 1, "name": "PCG64"},
    "ring": [np.zeros((2, 3), np.uint8), np.array([], np.float64), np.array([True, False])],
    "nothing": None,
}


def checkpoints(tmp_path, keep=3):
    return Checkpoints(tmp_path, connect("local"), keep, PhaseTimer())


def save(store, env_steps, content=CONTENT):
    return store.save(env_steps, {rank_part(0): content}, {"lr": 0.5})


def test_part_round_trip(tmp_path):
    write_part(tmp_path / "x.safetensors", CONTENT)
    back = read_part(tmp_path / "x.safetensors")
    assert back["clock"] == CONTENT["clock"]
    assert back["rng"] == CONTENT["rng"]
    assert back["nothing"] is None
    assert back["learner"]["online"].tolist() == [0, 1, 2, 3, 4, 5]
    assert back["learner"]["step"].shape == ()
    for got, given in zip(back["ring"], CONTENT["ring"], strict=True):
        assert got.dtype == given.dtype
        assert got.shape == given.shape


@pytest.mark.parametrize(
    "array",
    [np.arange(6).reshape(2, 3).astype(kind) for kind in "bBhHiIlLefd?"]
    + [np.zeros((0, 4), np.float32), np.array(3.5), np.arange(10)[::3], np.arange(4, dtype=">i4")]
    + [np.array([1 + 2j, 3]), np.array(["a", "bcd"]), np.array([b"x", b"yz"])],
    ids=lambda array: f"{array.dtype.str}{list(array.shape)}",
)
def test_any_array_of_plain_data_round_trips(tmp_path, array):
    write_part(tmp_path / "x.safetensors", {"a": array})
    back = read_part(tmp_path / "x.safetensors")["a"]
    assert (back.dtype, back.shape, back.tolist()) == (array.dtype, array.shape, array.tolist())


def test_a_part_is_a_safetensors_file_that_the_library_reads(tmp_path):
    write_part(tmp_path / "x.safetensors", {"a": np.arange(5, dtype=np.int16)})
    (array,) = safetensors.numpy.load_file(tmp_path / "x.safetensors").values()
    assert array.tolist() == [0, 1, 2, 3, 4]


def test_only_plain_data_is_written(tmp_path):
    for hidden in (print, np.array([print]), np.array(["2026-01-01"], "M8[s]")):
        with pytest.raises(TypeError, match="not plain data"):
            write_part(tmp_path / "x.safetensors", {"f": hidden})


def test_newest_of_several_is_found_and_old_ones_go(tmp_path):
    store = checkpoints(tmp_path, keep=2)
    for env_steps in (10, 20, 30):
        assert save(store, env_steps) == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000000020", "000000000030", "latest"]
    assert (tmp_path / "latest").resolve().name == "000000000030"
    found, wrong = store.newest_whole()
    assert found is not None
    assert (found.env_steps, wrong) == (30, {})
    assert found.read(rank_part(0))["clock"]["env_steps"] == 40


def test_a_half_written_one_is_not_seen(tmp_path):
    store = checkpoints(tmp_path)
    save(store, 10)
    (tmp_path / ".000000000020.tmp").mkdir()
    (tmp_path / "000000000030").mkdir()  # such as a crash of the file system leaves
    found, wrong = store.newest_whole()
    assert found is not None
    assert found.env_steps == 10
    assert len(wrong) == 1


def test_broken_ones_are_set_aside_and_latest_points_at_a_whole_one(tmp_path):
    store = checkpoints(tmp_path, keep=1)
    save(store, 10)
    whole = tmp_path / "000000000010"
    (tmp_path / "000000000020").mkdir()
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("000000000020")
    found, broken = store.newest_whole()
    store.fall_back(found, broken)
    assert (tmp_path / "latest").resolve() == whole
    assert (tmp_path / "000000000020.broken").is_dir()
    assert save(store, 15) == ""  # and it is the one kept, not the broken one that was newer
    assert store.newest_whole()[0].env_steps == 15


def test_without_a_whole_one_there_is_no_latest(tmp_path):
    store = checkpoints(tmp_path)
    save(store, 10)
    (tmp_path / "000000000010" / "manifest.json").unlink()
    found, broken = store.newest_whole()
    store.fall_back(found, broken)
    assert found is None
    assert not (tmp_path / "latest").is_symlink()


def test_the_best_is_kept_beside_the_newest(tmp_path):
    store = checkpoints(tmp_path, keep=1)
    for env_steps in (10, 20, 30):
        save(store, env_steps)
        if env_steps < 30:
            store.save(env_steps, {rank_part(0): {"from": env_steps}}, {}, best=True)
    assert open_checkpoint(tmp_path / "best").read(rank_part(0)) == {"from": 20}
    names = ["000000000030", "best", "best-000000000020", "latest"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    store.save(20, {rank_part(0): {"from": "a better one"}}, {}, best=True)
    assert open_checkpoint(tmp_path / "best").read(rank_part(0)) == {"from": "a better one"}
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_what_a_killed_attempt_left_is_swept_away(tmp_path):
    store = checkpoints(tmp_path)
    left = tmp_path / ".000000000010.tmp"
    left.mkdir(parents=True)
    (left / "rank-00000.safetensors").write_bytes(b"half a shard")
    save(store, 20)
    assert not left.exists()


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from hvdqn.checkpoint import read_part, write_part
from hvdqn.replay import Replay

def anonymous_megabytes():
    return next(int(line.split()[1]) / 1e3 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def replay():
    return Replay(2, 20_000, (84, 84), np.uint8, np.random.default_rng())

full = replay()
full.observation[:] = np.arange(84, dtype=np.uint8)
full._newest_serial[:] = full.rows_per_env
path = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
write_part(path, {"replay": full.state()})
written = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before
shard, empty, before = read_part(path), replay(), anonymous_megabytes()
empty.load_state(shard["replay"])
read = anonymous_megabytes() - before - empty.nbytes / 1e6
assert (empty.observation[:] == full.observation[:]).all()
print(written, read)
"""


def test_neither_writing_nor_reading_a_shard_doubles_its_memory(tmp_path):
    """141 MB of frames; both figures in MB beyond the ring itself, whose own pages are touched as it fills."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "x.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    written, read = map(float, done.stdout.split())
    assert written < 40
    assert read < 40


def test_two_hundred_random_corruptions_and_none_loads_silently(tmp_path):
    """Bits flipped, ends cut, bytes put in, files gone, over all files of a checkpoint."""
    store = checkpoints(tmp_path, keep=2)
    save(store, 10)
    save(store, 20)
    victims = sorted((tmp_path / "000000000020").iterdir())
    rng = random.Random(5)
    for _ in range(200):
        victim = rng.choice(victims)
        whole = victim.read_bytes()
        torn = bytearray(whole)
        kind = rng.choice(["flip", "cut", "insert", "gone"])
        if kind == "flip":
            torn[rng.randrange(len(torn))] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del torn[rng.randrange(len(torn)) :]
        elif kind == "insert":
            torn.insert(rng.randrange(len(torn)), rng.randrange(256))
        victim.unlink()
        if kind != "gone":
            victim.write_bytes(torn)
        found, wrong = store.newest_whole()
        assert found is not None
        assert found.env_steps == 10, f"{kind} in {victim.name} went unnoticed"
        assert len(wrong) == 1
        victim.write_bytes(whole)
    found, _ = store.newest_whole()
    assert found is not None
    assert found.env_steps == 20


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a checkpoint ran')",))


def test_a_hostile_checkpoint_runs_nothing(tmp_path):
    """A pickle where weights should be, with a manifest that vouches for it."""
    store = checkpoints(tmp_path)
    save(store, 10)
    weights = tmp_path / "000000000010" / "rank-00000.safetensors"
    for hostile in (pickle.dumps(Bomb()), torch_pickle(tmp_path)):
        weights.write_bytes(hostile)
        with pytest.raises(BrokenCheckpointError):
            read_part(weights)


def torch_pickle(tmp_path):
    torch.save(Bomb(), tmp_path / "bomb.pt")
    return (tmp_path / "bomb.pt").read_bytes()


def test_a_hostile_header_runs_nothing(tmp_path):
    """Names of types that hold Python objects, and nesting without end."""
    path = tmp_path / "x.safetensors"
    for text in (
        '{"__array__": "0", "__dtype__": "O"}',
        '{"__array__": "0", "__dtype__": "V8,O"}',
        "[" * 100_000,
    ):
        safetensors.numpy.save_file({"0": np.zeros(8, np.uint8)}, path, metadata={"data": text})
        with pytest.raises(BrokenCheckpointError):
            read_part(path)
    manifest = tmp_path / "000000000010" / "manifest.json"
    manifest.parent.mkdir()
    manifest.write_text('{"a":' * 100_000)
    with pytest.raises(BrokenCheckpointError):
        open_checkpoint(manifest.parent)


def test_an_unknown_format_is_refused(tmp_path):
    store = checkpoints(tmp_path)
    save(store, 10)
    path = tmp_path / "000000000010" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(BrokenCheckpointError, match="sha256 differs"):
        open_checkpoint(tmp_path / "000000000010")


def test_one_of_another_version_is_refused_and_not_set_aside(tmp_path, monkeypatch):
    store = checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 99)
        save(store, 10)
    with pytest.raises(OtherFormatError, match="has format 99, this version reads"):
        store.newest_whole()
    assert (tmp_path / "000000000010").is_dir()


def test_a_file_that_cannot_be_read_now_is_not_taken_for_a_broken_one(tmp_path, monkeypatch):
    store = checkpoints(tmp_path)
    save(store, 10)

    def stale(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(checkpoint, "_digest", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        store.newest_whole()
    assert (tmp_path / "000000000010").is_dir()


def test_a_disk_that_fails_leaves_the_old_checkpoint(tmp_path):
    store = checkpoints(tmp_path)
    save(store, 10)
    (tmp_path / ".000000000020.tmp").write_text("a file where the directory must go")
    assert "rank 0" in save(store, 20)
    found, _ = store.newest_whole()
    assert found is not None
    assert found.env_steps == 10
