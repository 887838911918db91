"""The exploration schedule, random actions, frame stacks, and the actor that uses them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hvdqn.acting import Actor, FrameStack, RandomActions, linear_epsilon
from hvdqn.config import EnvironmentConfig, ExplorationConfig, NetworkConfig
from hvdqn.envs import Environments, make_environments
from hvdqn.graphs import Record
from hvdqn.networks import QNetwork, make_network
from hvdqn.replay import Replay
from tests.unit.scripted_envs import TWO_EPISODES
from tests.unit.test_graphs import call_again

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("env_steps", "expected"), [(0, 0.9), (250, 0.7), (500, 0.5), (1_000, 0.1), (1_001, 0.1), (10**9, 0.1)]
)
def test_epsilon_falls_linearly_and_then_stays(env_steps, expected):
    config = ExplorationConfig(epsilon_start=0.9, epsilon_end=0.1, exploration_env_steps=1_000)
    assert linear_epsilon(config, env_steps) == pytest.approx(expected)


def test_epsilon_without_a_schedule_is_its_final_value():
    config = ExplorationConfig(epsilon_start=1.0, epsilon_end=0.2, exploration_env_steps=0)
    assert linear_epsilon(config, 0) == 0.2


def test_each_environment_draws_independently():
    """Counts lie within 4 standard deviations of the expectation for independent draws."""
    rounds, envs, epsilon, actions = 10_000, 4, 0.3, 1_000_000  # a random action is never the greedy one, -1
    random_actions, greedy = RandomActions(envs, actions, np.random.default_rng(0)), np.full(envs, -1)
    explored = np.array([random_actions.replace(greedy, epsilon) for _ in range(rounds)]) >= 0
    for env in range(envs):
        assert abs(explored[:, env].sum() - rounds * epsilon) < 4 * np.sqrt(rounds * epsilon * (1 - epsilon))
    together = epsilon**envs  # with one draw for all this would be epsilon
    assert abs(explored.all(axis=1).sum() - rounds * together) < 4 * np.sqrt(rounds * together)


def test_random_actions_are_uniform_over_all_actions():
    draws = np.concatenate(
        [
            RandomActions(8, 5, np.random.default_rng(s)).replace(np.zeros(8, np.int64), 1.0)
            for s in range(2_000)
        ]
    )
    counts = np.bincount(draws, minlength=5)
    assert len(counts) == 5
    assert abs(counts - len(draws) / 5).max() < 4 * np.sqrt(len(draws) * 0.2 * 0.8)


def test_epsilon_zero_is_greedy():
    greedy = np.arange(6) % 3
    assert (RandomActions(len(greedy), 3, np.random.default_rng(0)).replace(greedy, 0.0) == greedy).all()


@pytest.mark.parametrize("record", [None, call_again], ids=["eager", "recorded"])
def test_with_epsilon_zero_the_actor_is_greedy_with_the_current_parameters(record):
    envs = scripted(3)
    network = network_for(envs, 2)
    actor = make_actor(envs, 2, record=record, network=network)
    actor.start()
    chosen = []
    for _ in range(20):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            q = network(torch.from_numpy(actor.frames.observation)).numpy()
        chosen.append(actor.choose(0.0))
        assert (chosen[-1] == q.argmax(axis=1)).all()
        actor.step(chosen[-1])
    envs.close()
    assert len(np.unique(chosen)) > 1


def test_values_are_those_of_the_best_legal_actions():
    envs = scripted(3)
    network = network_for(envs, 2)
    actor = make_actor(envs, 2, network=network)
    actor.start()
    observation = actor.frames.observation
    with torch.no_grad():
        q = network(torch.from_numpy(observation)).numpy()
    np.testing.assert_allclose(actor.values(observation), q.max(axis=1), rtol=1e-6)
    mask = np.ones(q.shape, np.bool_)
    mask[range(3), q.argmax(axis=1)] = False
    second = np.sort(q, axis=1)[:, -2]
    np.testing.assert_allclose(actor.values(observation, mask), second, rtol=1e-6)
    envs.close()


def test_frame_stack_by_hand():
    frames = FrameStack(np.array([[0], [10]]), 3)
    assert frames.observation[..., 0].tolist() == [[0, 0, 0], [10, 10, 10]]
    frames.push(np.array([[1], [11]]), np.array([False, False]))
    frames.push(np.array([[2], [20]]), np.array([False, True]))
    assert frames.observation[..., 0].tolist() == [[0, 1, 2], [20, 20, 20]]
    frames.push(np.array([[3], [21]]), np.array([False, False]))
    assert frames.observation[..., 0].tolist() == [[1, 2, 3], [20, 20, 21]]


def test_a_stack_of_one_is_the_observation_itself():
    frames = FrameStack(np.array([[0.0], [10.0]]), 1)
    frames.push(np.array([[1.0], [20.0]]), np.array([False, True]))
    assert frames.observation.tolist() == [[1.0], [20.0]]


def test_an_actor_can_be_given_another_network():
    """As elastic training does, where the parameters move to other memory."""
    envs = scripted(3)
    first, second = network_for(envs, 2), network_for(envs, 2)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(-1)
    actor = make_actor(envs, 2, network=first)
    actor.start()
    chosen = []
    for network in (first, second):
        actor.set_network(network)
        with torch.no_grad():
            q = network(torch.from_numpy(actor.frames.observation)).numpy()
        chosen.append(actor.choose(0.0))
        assert (chosen[-1] == q.argmax(axis=1)).all()
    envs.close()
    assert (chosen[0] != chosen[1]).any()


def network_for(envs: Environments, depth: int) -> QNetwork:
    torch.manual_seed(0)
    return make_network(
        NetworkConfig(hidden=(8,)),
        "huber",
        envs.observation_shape,
        depth,
        is_image=False,
        actions=envs.num_actions,
    )


def make_actor(
    envs: Environments,
    depth: int,
    repeat: float = 0.0,
    record: Record | None = None,
    network: QNetwork | None = None,
) -> Actor:
    network = network or network_for(envs, depth)
    return Actor(envs, network, depth, np.random.default_rng(5), CPU, repeat=repeat, record=record)


def scripted(envs: int, seed: int = 0) -> Environments:
    config = EnvironmentConfig(env="tests.unit.scripted_envs:Scripted-v0", vectorization="sync")
    return make_environments(config, envs, seed, training=True)


@pytest.mark.parametrize("depth", [2, 4])
def test_the_actor_sees_the_stacks_that_replay_builds(depth):
    """For episodes shorter and longer than the stack, ended by termination and truncation, where the ring wraps."""
    envs = scripted(2)
    actor = make_actor(envs, depth)
    rng = np.random.default_rng(1)
    replay = Replay(2, 40, envs.observation_shape, envs.observation_dtype, rng, frame_stack=depth)
    replay.start(actor.start())
    seen = {}
    compared = {"observation": 0, "next_observation": 0}
    for _ in range(60):
        for stack in actor.frames.observation:
            seen[tuple(stack[-1])] = (
                stack.copy()
            )  # the newest frame, [episode, step in it], identifies the step
        actions = actor.choose(0.5)
        replay.add(actions, actor.step(actions))
        batch = replay.sample(16)
        for stack in batch.observation:
            np.testing.assert_array_equal(stack, seen[tuple(stack[-1])])
            compared["observation"] += 1
        for stack in batch.next_observation:
            if tuple(stack[-1]) in seen:  # no action is taken at a final observation
                np.testing.assert_array_equal(stack, seen[tuple(stack[-1])])
                compared["next_observation"] += 1
    assert compared["observation"] == 60 * 16
    assert compared["next_observation"] > 200
    episodes = {episode for episode, _ in seen}
    assert len(episodes) > len(TWO_EPISODES)
    envs.close()


@pytest.mark.parametrize("repeat", [0.0, 2.0])
def test_an_actor_continues_from_its_state(repeat):
    first, second = (make_actor(scripted(3), 2, repeat) for _ in range(2))
    first.start()
    for _ in range(7):
        first.step(first.choose(0.7))
    state = first.state()
    assert second.load_state(state)
    for _ in range(20):
        np.testing.assert_array_equal(first.frames.observation, second.frames.observation)
        actions = first.choose(0.7)
        np.testing.assert_array_equal(second.choose(0.7), actions)
        one, other = first.step(actions), second.step(actions)
        np.testing.assert_array_equal(one.reward, other.reward)
        np.testing.assert_array_equal(first.random.left, second.random.left)


def test_a_repeated_action_ends_with_its_episode():
    envs = scripted(4)
    actor = make_actor(envs, 1, repeat=1.01)  # mu close to 1: long repeats
    actor.start()
    cut = 0
    for _ in range(60):
        actions = actor.choose(1.0)
        left = actor.random.left.copy()
        step = actor.step(actions)
        cut += (left[step.fresh] > 0).sum()
        assert not actor.random.left[step.fresh].any()
        assert (actor.random.left == left)[~step.fresh].all()
    assert cut > 10
    envs.close()


def test_load_state_returns_false_if_the_environments_were_not_saved():
    config = EnvironmentConfig(env="tests.unit.scripted_envs:Forgetful-v0", vectorization="sync")
    first = make_actor(make_environments(config, 2, 0, training=True), 1)
    first.start()
    first.choose(1.0)
    state = first.state()
    assert state["environments"] is None
    second = make_actor(make_environments(config, 2, 0, training=True), 1)
    assert not second.load_state(state)
    second.start()
    assert (
        second.choose(1.0).tolist() == first.choose(1.0).tolist()
    )  # the random stream of exploration continues
