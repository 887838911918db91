"""Actions of several dimensions: translation, decoupled values against the enumeration of whole actions, whole runs."""

from __future__ import annotations

import itertools
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from hvdqn.acting import RandomActions, softmax_actions
from hvdqn.config import EnvironmentConfig, NetworkConfig
from hvdqn.dense_update import dense_head
from hvdqn.envs import make_environments
from hvdqn.envs.actions import Actions, draw_legal
from hvdqn.errors import UserError
from hvdqn.losses import expectation, mask_q, munchausen_bonus, select, soft_policy
from hvdqn.networks import QNetwork, make_network
from hvdqn.networks.dense import DenseNetwork
from hvdqn.train import main
from tests.unit.action_envs import BOX

D, N, BATCH = 3, 4, 5
JOINT = torch.tensor(list(itertools.product(range(N), repeat=D)))  # [N ** D, D]


def joint_values(values: torch.Tensor) -> torch.Tensor:
    """Return the value of each whole action, `[batch, N ** D]`, given values `[batch, D, N]`."""
    return torch.stack([values[:, range(D), action].mean(dim=1) for action in JOINT], dim=1)


def test_the_chosen_value_is_the_mean_over_dimensions() -> None:
    values = torch.arange(24.0).view(2, 12)  # 3 dimensions of 4 actions
    chosen = select(values, torch.tensor([[0, 1, 2], [3, 3, 3]]))
    assert chosen.tolist() == [(0 + 5 + 10) / 3, (15 + 19 + 23) / 3]
    quantiles = torch.stack([values, 10 * values], dim=2)
    assert select(quantiles, torch.tensor([[0, 1, 2], [3, 3, 3]])).tolist() == [[5.0, 50.0], [19.0, 190.0]]


@pytest.mark.parametrize("masked", [False, True])
def test_munchausen_equals_the_enumeration_of_whole_actions(masked: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(BATCH, D, N, generator=generator, dtype=torch.float64)
    next_q = torch.randn(BATCH, D, N, generator=generator, dtype=torch.float64)
    mask = torch.ones(BATCH, D, N, dtype=torch.bool)
    if masked:
        mask[:, 0, 1] = mask[:, 2, 3] = False
    action = torch.tensor([[0, 1, 2], [2, 3, 0], [3, 0, 1], [0, 0, 0], [2, 2, 2]])
    tau, alpha, clip = 0.4, 0.9, -2.0

    bonus = munchausen_bonus(mask_q(q, mask), action, alpha, D * tau, clip)
    policy, entropy = soft_policy(mask_q(next_q, mask), D * tau)
    value = expectation(next_q.flatten(1), policy)

    legal = torch.stack([mask[0, range(D), a].all() for a in JOINT])
    joint = joint_values(q).masked_fill(~legal, -torch.inf) / tau
    log_policy = torch.log_softmax(joint, dim=1)
    taken = (action * torch.tensor([N**2, N, 1])).sum(dim=1)
    expected = alpha * (tau * log_policy[range(BATCH), taken]).clamp(clip, 0.0)
    torch.testing.assert_close(bonus, expected)
    next_joint = joint_values(next_q).masked_fill(~legal, -torch.inf)
    probability = torch.softmax(next_joint / tau, dim=1)[:, legal]
    torch.testing.assert_close(value, (probability * next_joint[:, legal]).sum(dim=1))
    torch.testing.assert_close(entropy, -tau * (probability * probability.log()).sum(dim=1))


def test_softmax_draws_whole_actions() -> None:
    values = np.random.default_rng(1).normal(size=(1, 2, 3))
    count = 60_000
    drawn = softmax_actions(np.repeat(values, count, axis=0), 0.5, np.random.default_rng(0))
    joint = values[0, 0][:, None] / 2 + values[0, 1][None] / 2
    expected = np.exp(joint / 0.5) / np.exp(joint / 0.5).sum()
    found = np.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9).reshape(3, 3) / count
    assert found == pytest.approx(expected, abs=0.01)


def network(head: str, dueling: bool = False) -> QNetwork:
    torch.manual_seed(0)
    config = NetworkConfig(hidden=(16,), head=head, dueling=dueling, quantiles=7, iqn_embedding=8)  # type: ignore[arg-type]
    return make_network(config, "huber", (6,), 1, False, actions=N, action_shape=(D,))


@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize("head", ["scalar", "qr", "iqn"])
def test_the_best_action_of_each_dimension_is_the_best_whole_action(head: str, dueling: bool) -> None:
    made = network(head, dueling)
    output = made(torch.randn(BATCH, 6))
    values = made.head.q_values(output)
    assert values.shape == (BATCH, D, N)
    best = JOINT[joint_values(values).argmax(dim=1)]
    assert torch.equal(values.argmax(dim=-1), best)
    torch.testing.assert_close(made.head.greedy(output), select(output, best))
    mask = torch.rand(BATCH, D, N) < 0.5
    mask[..., 0] = True
    legal = torch.stack([mask[:, range(D), action].all(dim=1) for action in JOINT], dim=1)
    best = JOINT[joint_values(values).masked_fill(~legal, -torch.inf).argmax(dim=1)]
    torch.testing.assert_close(made.head.greedy(output, mask), select(output, best))


def test_dueling_centers_the_advantages_of_each_dimension() -> None:
    made = network("scalar", dueling=True)
    features = made.torso(torch.randn(BATCH, 6))
    value = made.head.streams.value(features)  # type: ignore[operator, union-attr]
    expected = value[:, None].expand(BATCH, D, 1)
    torch.testing.assert_close(made.head.q_values(made.head(features)).mean(dim=2, keepdim=True), expected)


@pytest.mark.parametrize("head", ["scalar", "hl-gauss", "qr"])
def test_actions_are_chosen_by_hand_written_passes_and_learned_by_autograd(head: str) -> None:
    made = network(head).double()
    observation = torch.randn(BATCH, 6, dtype=torch.float64)
    by_hand = DenseNetwork.of(made)
    assert by_hand is not None
    with torch.inference_mode():
        torch.testing.assert_close(by_hand.q_values(observation), made.q_values(observation))
    assert DenseNetwork.of(network(head, dueling=True)) is None
    assert dense_head(made.head) is None


def test_random_actions_replace_all_dimensions_of_an_environment() -> None:
    random = RandomActions(5000, 3, np.random.default_rng(0), repeat=1.5, shape=(2,))
    greedy = np.full((5000, 2), -1)
    first, second = random.replace(greedy, 0.5), random.replace(greedy, 0.0)
    chosen = first[:, 0] >= 0
    assert chosen.mean() == pytest.approx(0.5, abs=0.03)
    assert ((first[:, 1] >= 0) == chosen).all()
    repeated = second[:, 0] >= 0
    assert repeated.sum() > 500
    assert (second[repeated] == first[repeated]).all()


# --- Translation -----------------------------------------------------------------------------------------------------


def test_spaces_are_translated() -> None:
    box = Actions(BOX, bins=3)
    assert (box.shape, box.count, box.exists) == ((3,), 3, None)
    acts = box.to_environment(np.array([[0, 1, 2], [2, 2, 1]]))
    assert acts.dtype == np.float32
    assert acts.tolist() == [[[-1.0, 1.5, 2.0]], [[1.0, 3.0, 0.0]]]
    matrix = Actions(spaces.MultiDiscrete([[2, 3], [3, 2]], start=[[1, 0], [5, 0]]))
    assert matrix.to_environment(np.array([[1, 2, 0, 1]])).tolist() == [[[2, 2], [5, 1]]]
    assert matrix.exists is not None
    assert matrix.exists.sum(axis=1).tolist() == [2, 3, 3, 2]
    integers = Actions(spaces.Box(0, 10, (1,), np.int32), bins=3)
    assert integers.to_environment(np.array([[1]])).tolist() == [[5]]


def test_masks_of_several_dimensions_are_read() -> None:
    actions = Actions(spaces.MultiDiscrete([2, 3]))
    expected = [[True, False, False], [False, True, True]]
    padded = np.array([[1, 0, 1], [0, 1, 1]])  # where a dimension has no action, a mask cannot make one
    for mask in ([1, 0, 0, 1, 1], (np.array([1, 0]), np.array([0, 1, 1])), padded):
        assert actions.read_masks(mask).tolist() == expected
    assert actions.read_masks(np.array([[1, 0, 0, 1, 1]] * 4), 4).tolist() == [expected] * 4
    with pytest.raises(UserError, match="it must hold 5 booleans"):
        actions.read_masks([1, 0, 1])


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("name", ["Uneven", "Masked", "Matrix", "Binary", "Box"])
def test_environments_accept_the_actions(name: str, vectorization: str) -> None:
    config = EnvironmentConfig(
        env=f"tests.unit.action_envs:Additive{name}-v0",
        vectorization=vectorization,  # type: ignore[arg-type]
        action_bins=3 if name == "Box" else 0,
    )
    with closing(make_environments(config, 3, 1, True)) as envs:
        envs.reset()
        rng = np.random.default_rng(0)
        for _ in range(25):
            if envs.action_mask is None:
                step = envs.step(rng.integers(envs.num_actions, size=(3, *envs.action_shape)))
            else:
                step = envs.step(draw_legal(rng, envs.action_mask))
        assert (step.action_mask is None) == (name in ("Binary", "Box"))


# --- Whole runs ------------------------------------------------------------------------------------------------------

FLAGS = {
    "Even": "--n-step 3 --replay prioritized",
    "Uneven": "--head iqn --iqn-samples 8 --iqn-target-samples 8 --dueling --exploration ladder --epsilon-repeat 2",
    "Masked": "--munchausen --no-double --exploration softmax",
    "Matrix": "--noisy --exploration noisy --dueling --head hl-gauss",
    "Binary": "--layer-norm --no-double",
    "Box": "--action-bins 5 --head qr --quantiles 11",
}


@pytest.mark.parametrize("name", FLAGS)
def test_runs_train_and_resume(name: str, tmp_path: Path) -> None:
    argv = f"""--preset smoke --env tests.unit.action_envs:Additive{name}-v0 --total-env-steps 400 --learning-starts 100
        --checkpoint-every 200 --envs-per-rank 4 --run-dir {tmp_path / "run"} {FLAGS[name]}"""
    assert main(argv.split()) == 0
    assert main([*argv.split(), "--total-env-steps", "600"]) == 0


def digest(run_dir: Path) -> Any:
    return json.loads((run_dir / "summary.json").read_text())["param_sha256"]


def test_a_masked_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    flags = """--preset smoke --env tests.unit.action_envs:AdditiveMasked-v0 --learning-starts 100 --envs-per-rank 4
        --checkpoint-every 200 --munchausen --no-double --eval-episodes 0 --epsilon-repeat 2"""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for env_steps, run_dir in ((800, whole), (400, parts), (800, parts)):
        assert main([*flags.split(), "--total-env-steps", str(env_steps), "--run-dir", str(run_dir)]) == 0
    assert digest(whole) == digest(parts)


WRONG = {
    "--env Pendulum-v1": r"action space Box.* give --action-bins 3, or use a --wrapper",
    "--env CartPole-v1 --action-bins 3": r"--action-bins divides .* Box action space, and 'CartPole-v1' has Discrete",
    "--env Pendulum-v1 --action-bins 1": r"--action-bins is 1; it must be 0, or 2 or more",
    "--env tests.unit.action_envs:AdditiveUnbounded-v0 --action-bins 3": r"unbounded; use a --wrapper",
    "--env tests.unit.action_envs:AdditiveEven-v0 --head c51": r"--head c51 is not defined for actions of several",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_settings_are_refused_in_one_line(
    flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--preset", "smoke", "--run-dir", str(tmp_path / "run"), *flags.split()]
    assert main(argv) == 2
    written = capsys.readouterr()
    line = next(line for line in (written.out + written.err).splitlines() if "hvdqn: error" in line)
    with pytest.raises(UserError, match=WRONG[flags]):
        raise UserError(line)
