"""Torsos picked from the observation, layouts of images, and the head's answers."""

from __future__ import annotations

import pytest
import torch

from hvdqn.config import NetworkConfig, UserError
from hvdqn.networks import Images, make_network


def network(shape, stack=1, is_image=False, actions=4, **settings):
    return make_network(NetworkConfig(**settings), "huber", shape, stack, is_image, actions)


@pytest.mark.parametrize(
    ("frame", "stack", "planes"),
    [
        ((84, 84), 4, (4, 84, 84)),
        ((1, 84, 84), 4, (4, 84, 84)),
        ((10, 10, 7), 1, (7, 10, 10)),
        ((10, 10, 7), 2, (14, 10, 10)),
        ((3, 96, 64), 1, (3, 96, 64)),
    ],
)
def test_images_become_planes(frame, stack, planes):
    images = Images(frame, stack)
    assert images.planes == planes
    raw = torch.zeros((5, stack, *frame) if stack > 1 else (5, *frame))
    assert images(raw).shape == (5, *planes)


def test_channels_last_pixels_land_in_their_plane():
    """Stack of two 8 x 8 x 2 frames: plane = frame x channels + channel."""
    frames = torch.zeros(1, 2, 8, 8, 2)
    frames[0, 1, 3, 4, 0] = 1.0
    planes = Images((8, 8, 2), 2)(frames)
    assert planes.nonzero().tolist() == [[0, 2, 3, 4]]


@pytest.mark.parametrize(
    ("shape", "stack", "is_image", "parameters"),
    [
        ((4,), 1, False, 4 * 120 + 120 + 120 * 84 + 84 + 84 * 4 + 4),
        # Nature CNN: 1,684,000-odd parameters for 4 actions with 512 units (Mnih et al. 2015).
        ((84, 84), 4, True, 8224 + 32832 + 36928 + 3136 * 512 + 512 + 512 * 4 + 4),
        # MinAtar: 16 filters of 3 x 3 over 4 channels, 8 x 8 left.
        ((10, 10, 4), 1, True, 4 * 9 * 16 + 16 + 1024 * 128 + 128 + 128 * 4 + 4),
    ],
    ids=["vector", "atari", "minatar"],
)
def test_auto_torso(shape, stack, is_image, parameters):
    hidden = {"vector": (120, 84), "atari": (512,), "minatar": (128,)}
    name = "vector" if not is_image else "atari" if shape[0] == 84 else "minatar"
    made = network(shape, stack, is_image, hidden=hidden[name])
    assert sum(p.numel() for p in made.parameters()) == parameters


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32])
def test_q_values_of_any_dtype(dtype):
    made = network((84, 84), 4, True, hidden=(16,))
    assert made.q_values(torch.zeros((3, 4, 84, 84)).to(dtype)).shape == (3, 4)


def test_uint8_is_scaled():
    made = network((6,), hidden=())
    bright = torch.full((1, 6), 255, dtype=torch.uint8)
    torch.testing.assert_close(made(bright), made(torch.ones(1, 6)))


def test_one_action_and_no_hidden_layer():
    made = network((3,), actions=1, hidden=())
    assert made.q_values(torch.zeros(2, 3)).argmax(1).tolist() == [0, 0]


def test_torsos_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="needs images"):
        network((4,), torso="nature")
    with pytest.raises(UserError, match="10 x 10"):
        network((10, 10, 4), is_image=True, torso="nature")
