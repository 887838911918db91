"""Checkpoints return what was saved, and corrupted ones are detected."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import stat
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

import hvdqn
from hvdqn.bench.training import acting_parts
from hvdqn.checkpoint import (
    BrokenCheckpointError,
    Checkpoints,
    OtherFormatError,
    Progress,
    contents,
    load_shared_state,
    manifest,
    open_checkpoint,
    rank_part,
    read_part,
    reset_environments,
    shared_state,
    write_part,
)
from hvdqn.comm import connect
from hvdqn.comm.local import LocalComm
from hvdqn.config import parse
from hvdqn.links import follow_link
from hvdqn.metrics import PhaseTimer
from hvdqn.parts import build_parts
from hvdqn.replay import Replay
from hvdqn.replay.device import DeviceArray, DeviceMemory
from hvdqn.sync import Outcome, Totals

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


def test_newest_checkpoint_is_found_and_old_ones_are_deleted(tmp_path):
    store = checkpoints(tmp_path, keep=2)
    for env_steps in (10, 20, 30):
        assert save(store, env_steps) == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000000020", "000000000030", "latest"]
    assert (tmp_path / "latest").resolve().name == "000000000030"
    found, wrong = store.newest_valid()
    assert found is not None
    assert (found.env_steps, wrong) == (30, {})
    assert found.read(rank_part(0))["clock"]["env_steps"] == 40


def test_an_incomplete_checkpoint_is_ignored(tmp_path):
    store = checkpoints(tmp_path)
    save(store, 10)
    (tmp_path / ".000000000020.tmp").mkdir()
    (tmp_path / "000000000030").mkdir()  # a crash of the file system can leave this
    found, wrong = store.newest_valid()
    assert found is not None
    assert found.env_steps == 10
    assert len(wrong) == 1


def test_broken_checkpoints_are_set_aside_and_latest_points_at_a_valid_one(tmp_path):
    store = checkpoints(tmp_path, keep=1)
    save(store, 10)
    valid = tmp_path / "000000000010"
    (tmp_path / "000000000020").mkdir()
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("000000000020")
    found, broken = store.newest_valid()
    store.set_aside_broken(found, broken)
    assert (tmp_path / "latest").resolve() == valid
    assert (tmp_path / "000000000020.broken").is_dir()
    assert save(store, 15) == ""  # `keep` does not count the broken one, which is newer
    assert store.newest_valid()[0].env_steps == 15


def test_without_a_valid_checkpoint_there_is_no_latest(tmp_path):
    store = checkpoints(tmp_path)
    save(store, 10)
    (tmp_path / "000000000010" / "manifest.json").unlink()
    found, broken = store.newest_valid()
    store.set_aside_broken(found, broken)
    assert found is None
    assert not (tmp_path / "latest").is_symlink()


def test_the_best_checkpoint_is_kept_besides_the_newest(tmp_path):
    store = checkpoints(tmp_path, keep=1)
    for env_steps in (10, 20, 30):
        save(store, env_steps)
        if env_steps < 30:
            store.save(env_steps, {rank_part(0): {"from": env_steps}}, {}, best=True)
    assert open_checkpoint(tmp_path / "best").read(rank_part(0)) == {"from": 20}
    names = ["000000000030", "best", "best-000000000020", "latest"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    # Saved again at the same env step, it has another name: the link to the one before is valid until then.
    for which, name in (("a better one", "best-000000000020-2"), ("the best one", "best-000000000020")):
        store.save(20, {rank_part(0): {"from": which}}, {}, best=True)
        assert open_checkpoint(tmp_path / "best").read(rank_part(0)) == {"from": which}
        assert sorted(p.name for p in tmp_path.iterdir()) == [*names[:2], name, "latest"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


def test_best_is_never_lost_whenever_the_save_of_a_better_one_is_killed(tmp_path, monkeypatch):
    renames = 0
    rename = Path.rename

    def killed_at(last):
        def count(path, target):
            nonlocal renames
            renames += 1
            if renames > last:
                raise Killed
            return rename(path, target)

        return count

    for last in range(4):
        directory = tmp_path / str(last)
        store = checkpoints(directory)
        store.save(20, {rank_part(0): {"from": 1}}, {}, best=True)
        renames = 0
        with monkeypatch.context() as patch, suppress(Killed):
            patch.setattr(Path, "rename", killed_at(last))
            store.save(20, {rank_part(0): {"from": 2}}, {}, best=True)
        assert open_checkpoint(directory / "best").read(rank_part(0))["from"] in (1, 2)


def test_a_checkpoint_that_was_being_replaced_comes_back(tmp_path):
    store = checkpoints(tmp_path)
    save(store, 20)
    (tmp_path / "000000000020").rename(tmp_path / ".000000000020.old.tmp")
    found, broken = store.newest_valid()
    assert (found.env_steps, broken) == (20, {})


@pytest.fixture
def no_symlinks(monkeypatch):
    def symlink(*_, **__):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "symlink", symlink)


def test_without_symbolic_links_text_files_name_the_checkpoints(tmp_path, no_symlinks, caplog):
    store = checkpoints(tmp_path, keep=2)
    for env_steps in (10, 20, 30):
        assert save(store, env_steps) == ""
        assert store.save(env_steps, {rank_part(0): {"from": env_steps}}, {}, best=True) == ""
    names = ["000000000020", "000000000030", "best", "best-000000000030", "latest"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert (tmp_path / "latest").read_text().strip() == "000000000030"
    assert open_checkpoint(tmp_path / "latest").env_steps == 30
    assert open_checkpoint(tmp_path / "best").read(rank_part(0)) == {"from": 30}
    assert caplog.text.count("no symbolic links") == 1
    (tmp_path / "000000000030" / "manifest.json").unlink()
    store.set_aside_broken(*store.newest_valid())
    assert open_checkpoint(tmp_path / "latest").env_steps == 20


def test_a_link_that_cannot_be_written_fails_no_save_and_keeps_what_it_points_at(tmp_path, caplog):
    store = checkpoints(tmp_path, keep=2)
    store.save(10, {rank_part(0): {"from": 10}}, {}, best=True)
    (tmp_path / "latest").mkdir()  # as a tool leaves it that copies links as folders
    (tmp_path / "latest" / "manifest.json").touch()
    for env_steps in (10, 20, 30):
        assert save(store, env_steps) == ""
    assert sorted(path.name for path in tmp_path.glob("0*")) == ["000000000020", "000000000030"]
    assert caplog.text.count("latest' cannot be written") == 1


def test_a_text_file_names_nothing_outside_of_its_folder(tmp_path):
    for text in ("../secret", "/etc", "..", "", "\udcff", "a/b", "x" * 500):
        (tmp_path / "latest").write_bytes(text.encode(errors="surrogateescape"))
        assert follow_link(tmp_path / "latest") == tmp_path / "latest"


def test_a_file_system_without_fsync_of_directories_takes_checkpoints(tmp_path, monkeypatch):
    fsync = os.fsync

    def only_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    assert save(checkpoints(tmp_path), 10) == ""


def test_leftovers_of_a_killed_save_are_deleted(tmp_path):
    store = checkpoints(tmp_path)
    leftover = tmp_path / ".000000000010.tmp"
    leftover.mkdir(parents=True)
    (leftover / "rank-00000.safetensors").write_bytes(b"half a shard")
    save(store, 20)
    assert not leftover.exists()


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
    """A shard has 141 MB of frames. Both figures are MB beyond the memory of the replay itself."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "x.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    written, read = map(float, done.stdout.split())
    assert written < 40
    assert read < 40


RESHARD = """
import sys
from pathlib import Path
import numpy as np
from hvdqn.checkpoint import read_part, write_part
from hvdqn.replay import Replay, reshard

def anonymous_megabytes():
    return next(int(line.split()[1]) / 1e3 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def replay(capacity):
    return Replay(1, capacity, (84, 84), np.uint8, np.random.default_rng())

for rank in range(2):
    full = replay(10_000)
    full.observation[:] = np.arange(84, dtype=np.uint8) + rank
    full._newest_serial[:] = full.rows_per_env
    write_part(Path(sys.argv[1]) / str(rank), {"replay": full.state()})
del full
shards = [read_part(Path(sys.argv[1]) / str(rank))["replay"] for rank in range(2)]
new, before, most = replay(20_000), anonymous_megabytes(), 0.0

def watch(frame, event, argument):
    global most
    most = max(most, anonymous_megabytes())

sys.setprofile(watch)
new.load_state(reshard(shards, new, 0, 1))
sys.setprofile(None)
assert new.observation[5, 0, 1] == 1 and new.observation[15_000, 0, 1] == 2
print(most - before - new.nbytes / 1e6)
"""


def test_resuming_at_another_world_size_does_not_double_the_memory_of_replay(tmp_path):
    """The new ring has 141 MB of frames. The figure is MB beyond it."""
    command = [sys.executable, "-c", RESHARD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert float(done.stdout) < 60


def test_a_shard_on_a_device_is_written_and_read_in_pieces(tmp_path, monkeypatch):
    """A copy of the whole shard may not fit into the memory of the host."""
    replay = Replay(
        2, 8_000, (84, 84), np.uint8, np.random.default_rng(), memory=DeviceMemory(torch.device("cpu"))
    )
    replay.observation.tensor[:] = torch.arange(84, dtype=torch.uint8)
    replay._newest_serial[:] = replay.rows_per_env
    moved = []
    read, write = DeviceArray.__getitem__, DeviceArray.__setitem__

    def watched_read(array, rows):
        found = read(array, rows)
        moved.append(found.nbytes)
        return found

    def watched_write(array, rows, observation):
        moved.append(observation.nbytes)
        write(array, rows, observation)

    monkeypatch.setattr(DeviceArray, "__getitem__", watched_read)
    monkeypatch.setattr(DeviceArray, "__setitem__", watched_write)
    write_part(tmp_path / "x.safetensors", {"replay": replay.state()})
    written, moved[:] = moved.copy(), []
    assert sum(written) == replay.observation.nbytes
    other = Replay(
        2, 8_000, (84, 84), np.uint8, np.random.default_rng(), memory=DeviceMemory(torch.device("cpu"))
    )
    other.load_state(read_part(tmp_path / "x.safetensors")["replay"])
    assert sum(moved) == replay.observation.nbytes
    assert max(written + moved) <= 1 << 24
    assert torch.equal(other.observation.tensor, replay.observation.tensor)


def test_two_hundred_random_corruptions_are_all_detected(tmp_path):
    """Flip a bit, cut the end, insert a byte or delete a file, in any file of a checkpoint."""
    store = checkpoints(tmp_path, keep=2)
    save(store, 10)
    save(store, 20)
    victims = sorted((tmp_path / "000000000020").iterdir())
    rng = random.Random(5)
    for _ in range(200):
        victim = rng.choice(victims)
        original = victim.read_bytes()
        corrupted = bytearray(original)
        kind = rng.choice(["flip", "cut", "insert", "delete"])
        if kind == "flip":
            corrupted[rng.randrange(len(corrupted))] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del corrupted[rng.randrange(len(corrupted)) :]
        elif kind == "insert":
            corrupted.insert(rng.randrange(len(corrupted)), rng.randrange(256))
        victim.unlink()
        if kind != "delete":
            victim.write_bytes(corrupted)
        found, wrong = store.newest_valid()
        assert found is not None
        assert found.env_steps == 10, f"{kind} in {victim.name} was not detected"
        assert len(wrong) == 1
        victim.write_bytes(original)
    found, _ = store.newest_valid()
    assert found is not None
    assert found.env_steps == 20


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a checkpoint ran')",))


def test_a_pickle_in_a_checkpoint_is_not_executed(tmp_path):
    """`read_part` does not compare digests, so this is the case in which the manifest agrees with the pickle."""
    store = checkpoints(tmp_path)
    save(store, 10)
    weights = tmp_path / "000000000010" / "rank-00000.safetensors"
    for malicious in (pickle.dumps(Bomb()), torch_pickle(tmp_path)):
        weights.write_bytes(malicious)
        with pytest.raises(BrokenCheckpointError):
            read_part(weights)


def torch_pickle(tmp_path):
    torch.save(Bomb(), tmp_path / "bomb.pt")
    return (tmp_path / "bomb.pt").read_bytes()


def test_a_malicious_header_is_not_executed(tmp_path):
    """The header names dtypes that hold Python objects, or nests without end."""
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


def test_an_altered_manifest_is_refused(tmp_path):
    store = checkpoints(tmp_path)
    save(store, 10)
    path = tmp_path / "000000000010" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(BrokenCheckpointError, match="sha256 differs"):
        open_checkpoint(tmp_path / "000000000010")


def test_another_format_is_refused_and_not_set_aside(tmp_path, monkeypatch):
    store = checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "FORMAT", 99)
        save(store, 10)
    with pytest.raises(OtherFormatError, match="has format 99, this version reads"):
        store.newest_valid()
    assert (tmp_path / "000000000010").is_dir()


def test_a_temporary_read_error_does_not_mark_a_checkpoint_as_broken(tmp_path, monkeypatch):
    store = checkpoints(tmp_path)
    save(store, 10)

    def stale(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(manifest, "file_digest", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        store.newest_valid()
    assert (tmp_path / "000000000010").is_dir()


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    store = checkpoints(tmp_path)
    save(store, 10)
    (tmp_path / ".000000000020.tmp").write_text("a file in place of the directory")
    assert "rank 0" in save(store, 20)
    found, _ = store.newest_valid()
    assert found is not None
    assert found.env_steps == 10


class Scaled(torch.nn.Linear):
    """A torso with buffers: two that are saved and one that is made anew."""

    def __init__(self, shape):
        super().__init__(*shape, 8)
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("middle", torch.tensor(0.5), persistent=False)

    def forward(self, observation):
        return super().forward(observation * self.scale * self.middle)


SCALED = ["--torso", "tests.unit.test_checkpoint:Scaled"]
BUFFERS = ["torso.0.scale", "torso.0.count"]


@contextmanager
def small_parts(*flags):
    parts = build_parts(parse(["--preset", "smoke", "--hidden", "8", *flags]), LocalComm(), PhaseTimer())
    try:
        yield parts
    finally:
        acting_parts(parts).envs.close()


def test_contents_have_the_names_that_earlier_versions_wrote():
    with small_parts() as parts:
        reset_environments(parts)
        written = contents(parts, LocalComm(), Totals(), Progress(keeps_replay=True))
        assert written.keys() == {"learner", "rank-00000"}
        assert written["learner"].keys() == {"learner", "counters", "clock", "progress"}
        names = [name for name, _ in parts.learner.online.named_parameters()]
        assert list(written["learner"]["learner"]["target"]) == names
        assert written["rank-00000"].keys() == {"actor", "clock", "replay", "seconds", "torch"}
        without = contents(parts, LocalComm(), Totals(), Progress(keeps_replay=False))
        assert without["rank-00000"]["replay"] is None


@pytest.mark.parametrize("through_file", [False, True])
def test_shared_state_makes_another_rank_equal(tmp_path, through_file):
    progress = Progress(failed_checkpoints=1, evaluation={"eval_return_mean": 3.5}, world_changes=2)
    with small_parts() as before, small_parts() as after:
        for tensor in before.learner.state().values():
            tensor.copy_(torch.rand_like(tensor))
        totals, loaded = Totals(), Totals()
        totals.add(Outcome(np.arange(9.0), updates=3, skipped=7))
        before.strategy.skipped_in_a_row = 2
        before.clock.advance(808)
        before.clock.updates = 30
        state = shared_state(before, totals, progress)
        if through_file:
            write_part(tmp_path / "x.safetensors", state)
            state = read_part(tmp_path / "x.safetensors")
        assert load_shared_state(state, after, loaded) == progress
        assert (loaded.skipped_updates, after.strategy.skipped_in_a_row) == (7, 2)
        assert loaded.pop() == totals.pop()
        assert after.clock.state() == before.clock.state()
        for name, tensor in before.learner.state().items():
            assert torch.equal(after.learner.state()[name], tensor), name


@pytest.mark.parametrize("through_file", [False, True])
def test_shared_state_holds_the_persistent_buffers_of_both_networks(tmp_path, through_file):
    with small_parts(*SCALED) as before, small_parts(*SCALED) as after:
        buffers = before.learner.buffers
        assert list(buffers) == [f"{network}.{name}" for network in ("online", "target") for name in BUFFERS]
        for number, buffer in enumerate(buffers.values()):
            buffer += 10 * number
        state = shared_state(before, Totals(), Progress())
        if through_file:
            write_part(tmp_path / "x.safetensors", state)
            state = read_part(tmp_path / "x.safetensors")
        load_shared_state(state, after, Totals())
        for name, buffer in after.learner.buffers.items():
            assert torch.equal(buffer, buffers[name]), name
            assert buffer.dtype == buffers[name].dtype, name
        assert after.learner.sha256() == before.learner.sha256()
        after.learner.buffers["online.torso.0.scale"][1] += 1
        assert after.learner.sha256() != before.learner.sha256()
        after.learner.update_target()
        after.learner.buffers["online.torso.0.scale"] += 1
        assert after.learner.buffers["target.torso.0.scale"].tolist() == [1, 2, 1, 1]


def test_a_run_resumes_and_a_policy_acts_with_the_buffers_of_its_network(tmp_path):
    run = {"preset": "smoke", "hidden": (8,), "torso": SCALED[1], "run_dir": tmp_path, "eval_episodes": 0}
    hvdqn.train(total_env_steps=600, **run)
    path = tmp_path / "checkpoints" / "latest" / "policy.safetensors"
    part = read_part(path)
    assert set(part) - {"policy"} > set(BUFFERS)
    part["torso.0.scale"] = np.full(4, 3.0, np.float32)
    write_part(tmp_path / "scaled.safetensors", part)
    observation = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    policy = hvdqn.load(tmp_path / "scaled.safetensors", trust=True)
    unscaled = hvdqn.load(path, trust=True)
    np.testing.assert_array_equal(policy.q_values(observation / 4), unscaled.q_values(observation / 4 * 3))
    policy.save(tmp_path / "again.safetensors")
    assert read_part(tmp_path / "again.safetensors")["torso.0.scale"].tolist() == [3.0] * 4
    assert hvdqn.train(total_env_steps=700, **run).summary["env_steps"] == 704


def test_updates_wait_for_replay_to_fill_if_it_was_not_saved():
    with small_parts() as before, small_parts() as after:
        before.clock.advance(808)
        state = shared_state(before, Totals(), Progress())
        load_shared_state(state, after, Totals(), refill=True)
        assert after.clock.updates_owed(808 + after.clock.learning_starts) == after.clock.updates
