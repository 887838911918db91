"""Any two switches together make parts that act and learn, or are refused with a reason."""

from __future__ import annotations

import itertools
import math
import sys
import textwrap
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from threadpoolctl import ThreadpoolController, threadpool_limits

import hvdqn.networks.torsos
from hvdqn import train
from hvdqn.acting import Actor
from hvdqn.bench.training import acting_parts, update
from hvdqn.checkpoint import open_checkpoint, rank_part, restore
from hvdqn.comm.local import LocalComm
from hvdqn.config import Config, parse, preset_config
from hvdqn.config.algorithms import JOINED
from hvdqn.config.presets import PRESETS
from hvdqn.devices import choose_device
from hvdqn.errors import UserError
from hvdqn.metrics import PhaseTimer
from hvdqn.parts import build_parts, importance_at
from hvdqn.process import cpu_quota, share_of_cores, usable_cores
from hvdqn.replay import PrioritizedReplay
from hvdqn.role import Role
from hvdqn.seeds import torch_state
from hvdqn.sync import Totals
from tests.ranks import ThreadComm, run_ranks
from tests.unit.test_train import run

VECTOR = ["--env", "CartPole-v1"]
IMAGE = ["--env", "tests.unit.scripted_envs:ObservesImage-v0"]
TINY = [
    *("--envs-per-rank", "2", "--batch-per-rank", "8", "--replay-capacity", "400", "--learning-starts", "20"),
    *("--hidden", "16", "8", "--quantiles", "8", "--iqn-samples", "8", "--iqn-target-samples", "8"),
    *("--iqn-policy-samples", "4", "--atoms", "11"),
]

SWITCHES = {
    "double": "--double",
    "no double": "--no-double",
    "dueling": "--dueling",
    "n-step": "--n-step 3",
    "prioritized": "--replay prioritized",
    "noisy": "--noisy",
    "noise explores": "--noisy --exploration noisy",
    "ladder": "--exploration ladder",
    "softmax": "--exploration softmax",
    "c51": "--head c51",
    "hl-gauss": "--head hl-gauss",
    "qr": "--head qr",
    "iqn": "--head iqn",
    "munchausen": "--munchausen --no-double",
    "mse": "--loss mse",
    "layer norm": "--layer-norm",
    "rollouts": "--replay none --rollout-steps 8 --minibatches 2",
    "radam": "--optimizer radam",
    "rmsprop": "--optimizer rmsprop",
    "tau": "--target-tau 0.1",
    "bf16": "--precision bf16",
    "normalized": "--normalize-observations",
    "mlp": "--torso mlp",
    "minatar": "--torso minatar",
    "impala": "--torso impala",
    "spectral": "--torso impala --spectral-norm --torso-width 2 --torso-pool 1",
    "centered": "--torso minatar --center-images",
    "own torso": "--torso tests.unit.test_parts:Own",
}
# Two that choose the same thing: the later flag would win.
ALTERNATIVES = (
    ("double", "no double", "munchausen"),
    ("noise explores", "ladder", "softmax", "noisy"),
    ("c51", "hl-gauss", "qr", "iqn"),
    ("prioritized", "rollouts"),
    ("radam", "rmsprop"),
    ("mlp", "minatar", "impala", "spectral", "centered", "own torso"),
    *(("normalized", images) for images in ("minatar", "impala", "spectral", "centered")),
)
REFUSED = {
    ("c51", "munchausen"): "--munchausen is not defined for --head c51",
    ("c51", "mse"): "--loss mse has no meaning for --head c51",
    ("hl-gauss", "mse"): "--loss mse has no meaning for --head hl-gauss",
    ("qr", "mse"): "--loss mse has no meaning for --head qr",
    ("iqn", "mse"): "--loss mse has no meaning for --head iqn",
}


class Idle(gym.Env):
    """There is one thing to do."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Discrete(1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.5, bool(self.np_random.random() < 0.3), False, {}


gym.register("Idle-v0", Idle)


class Own(torch.nn.Module):
    """A user's torso, which says nothing of its width."""

    def __init__(self, shape):
        super().__init__()
        self.linear = torch.nn.Linear(torch.Size(shape).numel(), 12)

    def forward(self, observation):
        return torch.tanh(self.linear(observation.flatten(1)))


def learn(argv: list[str], updates: int = 3) -> None:
    """Act until replay can be drawn from, and take some updates; all of it must stay finite."""
    config = parse([*TINY, *argv])
    parts = build_parts(config, LocalComm(), PhaseTimer())
    acting, totals = acting_parts(parts), Totals()
    began = parts.learner.parameters.detach().clone()
    try:
        acting.replay.start(acting.actor.start())
        for _ in range(8):
            actions = acting.actor.choose(parts.epsilons.at(parts.clock.env_steps))
            acting.replay.add(actions, acting.actor.step(actions))
            parts.clock.tick()
        for _ in range(updates):
            importance = importance_at(config, parts.role, parts.clock.env_steps)
            batch = acting.replay.sample(config.batch_per_rank, importance)
            totals.add(update(parts, batch))
            acting.replay.update_priorities(batch.row_ids, parts.learner.td_errors.numpy())
    finally:
        acting.envs.close()
    assert totals.skipped_updates == 0
    assert parts.learner.parameters.isfinite().all()
    assert not torch.equal(parts.learner.parameters, began)
    assert totals.pop()["loss"] >= 0


PAIRS = [
    pair
    for pair in itertools.combinations(SWITCHES, 2)
    if not any(set(pair) <= set(group) for group in ALTERNATIVES)
]


@pytest.mark.parametrize("pair", PAIRS, ids=" + ".join)
def test_any_two_switches(pair):
    argv = [word for name in pair for word in SWITCHES[name].split()]
    reason = REFUSED.get(pair)
    if reason:
        with pytest.raises(UserError, match=reason):
            parse([*TINY, *argv])
        return
    images = {"minatar", "impala", "spectral", "centered"} & set(pair)
    learn([*(IMAGE if images else VECTOR), *argv])


@pytest.mark.parametrize("head", ["scalar", "c51", "hl-gauss", "qr", "iqn"])
def test_all_switches_at_once(head):
    learn([*VECTOR, *f"--head {head} --double --dueling --n-step 3 --replay prioritized --noisy".split()])
    if head != "c51":
        images = "--torso impala --frame-stack 2 --exploration softmax --layer-norm --munchausen --no-double"
        learn([*IMAGE, *f"--head {head} --dueling --n-step 3 --replay prioritized --noisy {images}".split()])


@pytest.mark.parametrize("head", ["scalar", "c51", "hl-gauss", "qr", "iqn"])
def test_one_action(head):
    flags = f"--env tests.unit.test_parts:Idle-v0 --head {head} --dueling --exploration softmax"
    learn(flags.split())
    if head != "c51":
        learn([*flags.split(), "--munchausen", "--no-double"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--munchausen", "--no-double"),
        ("--munchausen --no-double --munchausen-clip 0.5", "--munchausen-clip is 0.5; it must be 0 or less"),
        ("--exploration noisy", "--exploration noisy needs the noise of --noisy"),
        ("--head c51 --v-min 3 --v-max 3", "--v-min 3 to --v-max 3"),
        ("--head c51 --atoms 1", "at least 2 atoms"),
        (
            "--head hl-gauss --v-min 3 --v-max 3",
            "--head hl-gauss with --atoms 51 from --v-min 3 to --v-max 3",
        ),
        ("--head hl-gauss --hl-gauss-sigma 0", "--hl-gauss-sigma is 0.0; it must be above 0"),
        ("--head qr --quantiles 0", "--quantiles is 0; it must be at least 1"),
        ("--torso natur", "unknown --torso 'natur'; did you mean 'nature'"),
        ("--priority-alpha 1.5", "--priority-alpha is 1.5; it must be within [0, 1]"),
        (
            "--replay none --minibatches 7",
            "--minibatches 7 does not divide the 256 steps of a rank in a rollout",
        ),
        ("--replay none --prefill known.npz", "--prefill fills replay, and with --replay none there is none"),
        ("--replay none --rollout-steps 1", "--rollout-steps is 1; it must be at least 2"),
        ("--temperature 0", "--temperature is 0.0; it must be above 0"),
    ],
)
def test_what_cannot_be_right_is_refused(flags, words):
    with pytest.raises(UserError) as refused:
        parse(flags.split())
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


# A user's own torso


class Normalised(torch.nn.Sequential):
    def __init__(self, shape):
        super().__init__(torch.nn.Linear(shape[0], 8), torch.nn.BatchNorm1d(8))


class Narrow(torch.nn.Linear):
    def __init__(self, shape):
        super().__init__(3, 8)


class Unflat(torch.nn.Identity):
    def __init__(self, shape):
        super().__init__()

    def forward(self, observation):
        return observation[0]


class Pixels(torch.nn.Conv2d):
    def __init__(self, shape):
        channels, _, _ = shape
        super().__init__(channels, 4, 3)


class Frozen(torch.nn.Sequential):
    def __init__(self, shape):
        super().__init__(torch.nn.Linear(shape[0], 8).requires_grad_(False), torch.nn.ReLU())


class Counting(torch.nn.Linear):
    def __init__(self, shape):
        super().__init__(shape[0], 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, observation):
        self.calls += 1
        return super().forward(observation)


class Unmakeable(torch.nn.Linear):
    def __init__(self, shape):
        super().__init__(shape[0] + 1, 8)
        self(torch.zeros(2, *shape))


def not_a_module(shape):
    return shape


@pytest.mark.parametrize(
    ("torso", "words"),
    [
        ("no_such_module:Torso", "cannot import 'no_such_module'"),
        ("tests.unit.test_parts:Absent", "has no 'Absent'"),
        ("tests.unit.test_parts:", "not of the form module:attribute"),
        ("tests.unit.test_parts:not_a_module", "gave a tuple; it must be a torch.nn.Module"),
        ("tests.unit.test_parts:Normalised", "batch norm, whose statistics would differ between ranks"),
        ("tests.unit.test_parts:Frozen", "parameters that want no gradient"),
        ("tests.unit.test_parts:Counting", "buffers that a forward pass changes"),
        ("tests.unit.test_parts:Unmakeable", "cannot be made for observations of shape (4,): mat1 and mat2"),
        ("tests.unit.test_parts:Narrow", "does not take floats of shape [batch, 4]"),
        ("tests.unit.test_parts:Unflat", "gave (4,) for a batch of 2; it must give [batch, features]"),
        ("tests.unit.test_parts:Pixels", "cannot be made for observations of shape (4,)"),
    ],
)
def test_a_torso_that_does_not_fit_is_refused(torso, words):
    with pytest.raises(UserError) as refused:
        build_parts(parse([*TINY, *VECTOR, "--torso", torso]), LocalComm(), PhaseTimer())
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_documented_torso_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The example of `hvdqn.networks.torsos`, word for word, in a file of its own."""
    text = hvdqn.networks.torsos.__doc__
    assert text is not None
    example = textwrap.dedent(text[text.index("    # wide.py") : text.index("The layers of")])
    assert len(example.strip().splitlines()) <= 10
    (tmp_path / "wide.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "wide", None)
    monkeypatch.delitem(sys.modules, "wide")
    learn([*IMAGE, "--torso", "wide:Wide", "--hidden", "256"])
    learn([*IMAGE, "--torso", "wide:Wide", "--frame-stack", "2", "--head", "iqn"])


# Presets


def test_joined_presets_take_what_is_tuned_for_the_two():
    for first, second in JOINED:
        for names in (f"{first},{second}", f"{second},{first}"):
            flat = preset_config(names).flat()
            for name, value in JOINED[first, second].items():
                assert flat[name] == value
    both = preset_config("atari,rainbow")
    assert both.environment.env == PRESETS["atari"]["env"]
    assert both.network.head == "c51"


@pytest.mark.parametrize("algorithm", ["dqn", "double-dueling", "rainbow", "iqn", "m-iqn", "btr"])
@pytest.mark.parametrize("first", [True, False])
def test_algorithms_join_environments_in_any_order(algorithm, first):
    """Neither touches what the other is about: the parts are the algorithm's, but for what both together name."""
    for environment in ("cartpole", "acrobot", "mountaincar", "lunarlander", "minatar", "atari", "pong"):
        names = [algorithm, environment] if first else [environment, algorithm]
        config = parse(["--preset", ",".join(names)])
        due = {**PRESETS[algorithm], **JOINED.get((environment, algorithm), {})}
        for part in ("head", "replay", "dueling", "noisy", "munchausen", "exploration"):
            assert config.flat()[part] == due[part], part
        assert config.environment.env == PRESETS[environment]["env"]


# Threads


@pytest.mark.parametrize(("hidden", "threads"), [("8", 1), ("800 800", 2)], ids=["small", "large"])
def test_torch_and_numpy_use_as_many_threads_as_a_rank_has(hidden, threads):
    config = parse(["--preset", "smoke", "--threads-per-rank", "2", "--hidden", *hidden.split()])
    with threadpool_limits():  # puts back what was
        build_parts(config, LocalComm(), PhaseTimer())
        blas = ThreadpoolController().select(user_api="blas").info()
        assert torch.get_num_threads() == threads
        assert [library["num_threads"] for library in blas] == [threads] * len(blas)


# Prioritized replay


@pytest.mark.parametrize(
    ("bound", "threads"),
    [
        ([{0, 1, 2, 3}] * 2, [2, 2]),
        ([{0, 1, 2, 3}, {4, 5, 6, 7}], [4, 4]),
        ([{0, 1}, {0, 1}, {2}], [1, 1, 1]),
        ([{0}] * 3, [1, 1, 1]),
    ],
    ids=["free", "each to its own", "in part", "more ranks than cores"],
)
def test_cores_are_shared_among_the_ranks_that_may_use_them(bound, threads, monkeypatch: pytest.MonkeyPatch):
    mine = threading.local()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: mine.cores)
    monkeypatch.setattr("hvdqn.process.cpu_quota", lambda: math.inf)

    def body(comm):
        mine.cores = bound[comm.rank]
        return share_of_cores(Config(), comm)

    assert run_ranks(len(bound), body) == threads


@pytest.mark.parametrize(
    ("quota", "ranks", "threads"), [(2.0, 1, 2), (2.0, 2, 1), (7.5, 2, 3), (0.5, 1, 1), (100.0, 2, 32)]
)
def test_ranks_share_the_quota_of_their_control_group(
    quota: float, ranks: int, threads: int, monkeypatch: pytest.MonkeyPatch
):
    """Such as that of `docker --cpus=2` on 64 cores."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr("hvdqn.process.cpu_quota", lambda: quota)
    assert usable_cores() == min(64, max(1, int(quota)))
    assert run_ranks(ranks, lambda comm: share_of_cores(Config(), comm)) == [threads] * ranks


V1 = {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/a/b\n", {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "max 100000\n"}, 1.5),
        ("0::/on/the/host\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/../other\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("3:cpu,cpuacct:/docker/7\n", {f"cpu,cpuacct/docker/7/{name}": V1[name] for name in V1}, math.inf),
        (
            "4:memory:/docker/7\n3:cpuacct,cpu:/docker/7\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            4.0,
        ),
        ("1:name=systemd:/\n0::/\n", {}, math.inf),
        ("0::/\n", {"cpu.max": "what\n"}, math.inf),
        (None, {}, math.inf),
    ],
    ids=[
        "v2 in a container",
        "v2 without a limit",
        "v2 of a parent",
        "v2 with the host's path",
        "v2 outside",
        "v1 without a limit",
        "v1 with the host's path",
        "no controller",
        "unreadable",
        "no control groups",
    ],
)
def test_the_quota_of_control_groups(groups: str | None, files: dict[str, str], quota: float, tmp_path: Path):
    places = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in {**places, **({"proc/self/cgroup": groups} if groups else {})}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == quota


def devices(
    seen: Sequence[Sequence[str]], monkeypatch: pytest.MonkeyPatch, engine_shares: bool = True
) -> list[tuple[torch.device, int]]:
    """What ranks that see these GPUs choose."""
    mine = threading.local()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(mine.gpus))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr("hvdqn.devices.visible_gpus", lambda: mine.gpus)
    monkeypatch.setattr(ThreadComm, "ranks_may_share_a_gpu", engine_shares)

    def body(comm):
        mine.gpus = seen[comm.rank]
        return choose_device(Config(), comm, PhaseTimer())

    return run_ranks(len(seen), body)


@pytest.mark.parametrize(
    ("seen", "numbers", "sharing"),
    [
        ([["a", "b"]] * 2, [0, 1], [1, 1]),
        ([["a"], ["b"]], [0, 0], [1, 1]),
        ([["a", "b"], ["c", "d"], ["a", "b"], ["c", "d"]], [0, 0, 1, 1], [1] * 4),
        ([["a", "b"]] * 3, [0, 1, 0], [2, 1, 2]),
        ([["a"], ["a"]], [0, 0], [2, 2]),
    ],
    ids=["all see all", "each sees its own", "two hosts, in turn", "more ranks than GPUs", "one for all"],
)
def test_gpus_are_assigned_to_the_ranks_that_see_them(
    seen, numbers, sharing, monkeypatch: pytest.MonkeyPatch
):
    expected = [(torch.device("cuda", number), ranks) for number, ranks in zip(numbers, sharing, strict=True)]
    assert devices(seen, monkeypatch) == expected
    if max(sharing) == 1:
        assert devices(seen, monkeypatch, engine_shares=False) == expected
    else:
        with pytest.raises(
            UserError, match=r"--comm mpi wants a GPU for each rank, and \d ranks see \d GPUs?; start"
        ):
            devices(seen, monkeypatch, engine_shares=False)


def test_ranks_without_a_gpu_are_named(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="no GPU is seen by rank 1, 3, and one is by others; start all where"):
        devices([["a"], [], ["b"], []], monkeypatch)
    assert devices([[], []], monkeypatch) == [(torch.device("cpu"), 2)] * 2


def test_beta_rises_to_one_over_global_env_steps():
    flags = "--replay prioritized --priority-beta 0.4 --total-env-steps 1000 --replay-capacity 600"
    config = parse([*flags.split(), "--learning-starts", "100"])
    for env_steps, beta, n in ((0, 0.4, 1), (500, 0.7, 500), (1_000, 1.0, 600), (1_008, 1.0, 600)):
        importance = importance_at(config, Role(True, 0, 4), env_steps)
        assert (importance.beta, importance.n_global, importance.size) == (pytest.approx(beta), n, 4)


def test_td_errors_of_an_update_become_priorities():
    config = parse([*TINY, *VECTOR, "--replay", "prioritized", "--priority-alpha", "1"])
    parts = build_parts(config, LocalComm(), PhaseTimer())
    acting = acting_parts(parts)
    acting.replay.start(acting.actor.start())
    for _ in range(20):
        actions = acting.actor.choose(1.0)
        acting.replay.add(actions, acting.actor.step(actions))
    batch = acting.replay.sample(8)
    update(parts, batch)
    row_ids, td_errors = batch.row_ids, parts.learner.td_errors.numpy()
    assert isinstance(acting.replay, PrioritizedReplay)
    acting.replay.update_priorities(row_ids, td_errors)
    rows, held = acting.replay.rows_of(row_ids)
    assert held.all()
    priorities = acting.replay._tree.priorities[rows]
    assert priorities == pytest.approx(td_errors + 1e-6, rel=1e-4)
    acting.envs.close()


@pytest.mark.parametrize(
    "flags",
    [
        (
            "--head",
            "iqn",
            "--noisy",
            "--replay",
            "prioritized",
            "--iqn-samples",
            "8",
            "--iqn-target-samples",
            "8",
        ),
        ("--exploration", "softmax", "--replay", "prioritized", "--n-step", "3"),
    ],
    ids=["iqn noisy", "softmax"],
)
def test_a_resumed_run_ends_with_the_same_bits(flags, tmp_path: Path):
    """Noise, fractions, priorities and the draws from all of them go on where the checkpoint was."""
    flags = (*flags, "--checkpoint-every", "320", "--total-env-steps", "640")
    whole = run(tmp_path, *flags)
    (tmp_path / "checkpoints" / "latest").unlink()
    newest = sorted(entry for entry in (tmp_path / "checkpoints").iterdir() if entry.name.isdigit())
    assert [int(entry.name) for entry in newest] == [320, 640]
    for path in newest[-1].iterdir():
        path.unlink()
    newest[-1].rmdir()
    assert run(tmp_path, *flags)["param_sha256"] == whole["param_sha256"]
    other_network = ("--dueling", "--preset", "smoke", "--run-dir", str(tmp_path))
    assert train.main([*flags, *other_network]) == 2


def test_noise_goes_on_where_environments_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(tmp_path, "--noisy", "--total-env-steps", "320")
    checkpoint = open_checkpoint(tmp_path / "checkpoints" / "latest")
    config = Config().replace(**checkpoint.manifest["config"])
    monkeypatch.setattr(Actor, "load_state", lambda self, state: False)
    parts = build_parts(config, LocalComm(), PhaseTimer())
    with closing(acting_parts(parts).envs):
        _, lines = restore(parts, checkpoint, config, LocalComm(), Totals())
    assert any("not bit for bit" in line for line in lines)
    np.testing.assert_array_equal(
        torch_state(parts.device)["cpu"], checkpoint.read(rank_part(0))["torch"]["cpu"]
    )
