"""What is written is read back, and what is broken is found."""

from __future__ import annotations

import json
import pickle
import random

import numpy as np
import pytest
import safetensors.numpy
import torch

from hvdqn.checkpoint import (
    BrokenCheckpointError,
    Checkpoints,
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


def test_a_part_is_a_safetensors_file_that_the_library_reads(tmp_path):
    write_part(tmp_path / "x.safetensors", {"a": np.arange(5, dtype=np.int16)})
    (array,) = safetensors.numpy.load_file(tmp_path / "x.safetensors").values()
    assert array.tolist() == [0, 1, 2, 3, 4]


def test_only_plain_data_is_written(tmp_path):
    with pytest.raises(TypeError, match="not plain data"):
        write_part(tmp_path / "x.safetensors", {"f": print})


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


def test_an_unknown_format_is_refused(tmp_path):
    store = checkpoints(tmp_path)
    save(store, 10)
    path = tmp_path / "000000000010" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(BrokenCheckpointError):
        open_checkpoint(tmp_path / "000000000010")


def test_a_disk_that_fails_leaves_the_old_checkpoint(tmp_path):
    store = checkpoints(tmp_path)
    save(store, 10)
    (tmp_path / ".000000000020.tmp").write_text("a file where the directory must go")
    assert "rank 0" in save(store, 20)
    found, _ = store.newest_whole()
    assert found is not None
    assert found.env_steps == 10
