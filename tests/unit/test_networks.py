"""Torsos: which one an observation gets, layouts of images, and the Q-values behind them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hvdqn.config import NetworkConfig, preset_config
from hvdqn.errors import UserError
from hvdqn.networks import Images, make_network, spectral_layers
from hvdqn.networks.layers import WideLinear
from hvdqn.networks.torsos import Centered, ChannelsLast


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


def test_each_image_is_centered_by_its_own_mean():
    images = torch.tensor([[[1.0, 2.0], [3.0, 6.0]], [[0.0, 0.0], [0.0, 4.0]]])
    assert Centered()(images).tolist() == [[[-2, -1], [0, 3]], [[-1, -1], [-1, 3]]]


@pytest.mark.parametrize("channels", [2, 8], ids=["fewer", "as many as rows, as MinAtar's Seaquest"])
def test_channels_last_pixels_land_in_their_plane(channels):
    """Stack of two 8 x 8 x C frames: plane = frame x channels + channel."""
    frames = torch.zeros(1, 2, 8, 8, channels)
    frames[0, 1, 3, 4, 0] = 1.0
    planes = Images((8, 8, channels), 2)(frames)
    assert planes.nonzero().tolist() == [[0, channels, 3, 4]]


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


def conv(inputs, outputs, kernel=3):
    return kernel * kernel * inputs * outputs + outputs


@pytest.mark.parametrize(("frame", "stack", "left"), [((84, 84), 4, 11 * 11), ((10, 10, 4), 1, 2 * 2)])
def test_impala_torso(frame, stack, left):
    """Sections of 16, 32, 32 filters: one convolution, a pool that halves, two blocks of two convolutions."""
    made = network(frame, stack, is_image=True, torso="impala", hidden=(256,))
    sections = sum(conv(i, o) + 4 * conv(o, o) for i, o in ((4, 16), (16, 32), (32, 32)))
    head = 32 * left * 256 + 256 + 256 * 4 + 4
    assert sum(p.numel() for p in made.parameters()) == sections + head
    assert made.q_values(torch.zeros(2, *((stack,) if stack > 1 else ()), *frame)).shape == (2, 4)


def test_the_network_of_beyond_the_rainbow_has_the_size_of_the_paper():
    """2.91 million parameters, 2.52 million of them in linear layers (Clark et al. 2025, figure E7), without noise."""
    settings = preset_config("atari,btr").network
    made = make_network(dataclasses.replace(settings, noisy=False), "huber", (84, 84), 4, True, 18)
    total = sum(p.numel() for p in made.parameters())
    linear = sum(p.numel() for p in made.head.parameters())
    assert (round(total / 1e6, 2), round(linear / 1e6, 2)) == (2.91, 2.52)
    assert made.torso.features == 6 * 6 * 64
    assert len(spectral_layers(made)) == 3 * 2 * 2  # sections, residual blocks, convolutions


@pytest.mark.parametrize(
    ("frame", "stack", "pool", "left"),
    [
        ((84, 84), 4, 0, 11 * 11),
        ((84, 84), 4, 6, 6 * 6),
        ((210, 160), 1, 6, 6 * 6),
        ((10, 10, 4), 1, 2, 2 * 2),
    ],
)
def test_width_and_pool_of_impala(frame, stack, pool, left):
    made = network(frame, stack, True, torso="impala", torso_width=3, torso_pool=pool, hidden=(8,))
    assert made.torso.features == 3 * 32 * left
    observation = torch.zeros((2, stack, *frame) if stack > 1 else (2, *frame))
    assert made.torso(observation).shape == (2, made.torso.features)


def test_a_pool_keeps_the_largest_numbers_of_overlapping_windows():
    """Rows and columns 0-1, 1-3, 3-5, 5-7, 7-9 and 9-10 of the 11 that are left of an Atari image."""
    made = network((84, 84), 4, True, torso="impala", torso_pool=6, hidden=(8,))
    *before, pool, flatten = made.torso
    planes = torch.nn.Sequential(*before)(torch.rand(2, 4, 84, 84))
    windows = [(0, 2), (1, 4), (3, 6), (5, 8), (7, 10), (9, 11)]
    naive = [planes[:, :, a:b, c:d].amax(dim=(2, 3)) for a, b in windows for c, d in windows]
    assert torch.equal(flatten(pool(planes)), torch.stack(naive, dim=2).flatten(1))


@pytest.mark.parametrize("torso", ["minatar", "impala"])
def test_layer_norm_of_convolutions(torso):
    """There is one before every ReLU, so that large inputs do not give large outputs."""
    made = network((10, 10, 4), is_image=True, torso=torso, hidden=(16,), layer_norm=True)
    kinds = [type(module).__name__ for module in made.modules()]
    assert kinds.count("GroupNorm") + kinds.count("LayerNorm") == kinds.count("ReLU")
    assert made(1e4 * torch.randn(3, 10, 10, 4)).abs().max() < 100


@pytest.mark.parametrize(
    ("hidden", "shared"),
    [((), 6), ((8,), 8), ((8, 5), 8), ((8, 5, 3), 5)],
    ids=["none", "one", "two", "three"],
)
def test_the_last_hidden_layer_belongs_to_the_head(hidden, shared):
    """Except in an MLP of one layer, whose torso would be empty."""
    made = network((6,), hidden=hidden)
    assert made.torso.features == shared
    assert made.torso(torch.zeros(2, 6)).shape == (2, shared)


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


@pytest.mark.parametrize("frame", [(2, 5), (10, 2, 3), (1, 1, 1)])
@pytest.mark.parametrize("stack", [1, 3])
def test_auto_takes_images_smaller_than_every_kernel(frame, stack):
    made = network(frame, stack, is_image=True)
    observation = torch.zeros((7, stack, *frame) if stack > 1 else (7, *frame), dtype=torch.uint8)
    assert made(observation).shape[:2] == (7, 4)
    with pytest.raises(UserError, match="--torso minatar cannot take an image"):
        network((10, 2, 3), stack, is_image=True, torso="minatar")


def test_a_torso_that_does_not_fit_is_an_error():
    with pytest.raises(UserError, match="needs images"):
        network((4,), torso="nature")
    with pytest.raises(UserError, match="10 x 10"):
        network((10, 10, 4), is_image=True, torso="nature")
    with pytest.raises(
        UserError, match=r"--torso-pool 6 cannot pool the 2 x 2 planes .*; give 2 or less, or 0"
    ):
        network((10, 10, 4), is_image=True, torso="impala", torso_pool=6)
    with pytest.raises(UserError, match=r"--center-images needs images, observations are \(4,\)"):
        network((4,), center_images=True)


@pytest.mark.parametrize("torso", ["mlp", "nature", "impala"])
def test_centered_images_have_no_background(torso):
    """The output is the same for an image that is brighter by a constant."""
    made = network((84, 84), 4, True, torso=torso, hidden=(16,), center_images=True)
    dark = torch.randint(0, 100, (3, 4, 84, 84)).to(torch.uint8)
    brighter = dark + torch.tensor([0, 40, 155], dtype=torch.uint8)[:, None, None, None]
    torch.testing.assert_close(made(brighter), made(dark), rtol=1e-4, atol=1e-5)
    plain = network((84, 84), 4, True, torso=torso, hidden=(16,))
    assert not torch.allclose(plain(brighter)[1:], plain(dark)[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("torso", ["nature", "impala"])
def test_convolutions_do_not_depend_on_the_memory_layout(torso):
    made = network((84, 84), 4, True, torso=torso, hidden=(16,)).double()
    observation = torch.rand(2, 4, 84, 84).double()
    layers = [layer for layer in made.torso if not isinstance(layer, ChannelsLast)]
    assert len(layers) == len(made.torso) - 1
    plain = torch.nn.Sequential(*layers)(observation)
    torch.testing.assert_close(made.torso(observation), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_wide_layer_is_a_linear_layer(dtype, autocast):
    made = network((1024,), hidden=(512, 256)).to(dtype)
    wide = next(layer for layer in made.modules() if isinstance(layer, WideLinear))
    assert wide.weight.shape == (512, 1024)
    inputs, plain_inputs = (torch.ones(6, 1024, dtype=dtype).div_(7).requires_grad_() for _ in range(2))
    plain = torch.nn.Linear(1024, 512).to(dtype)
    plain.load_state_dict(wide.state_dict())
    for layer, given in ((wide, inputs), (plain, plain_inputs)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = layer(given)
        (output.to(dtype) ** 2).sum().backward()
    torch.testing.assert_close(inputs.grad, plain_inputs.grad)
    torch.testing.assert_close(wide.weight.grad, plain.weight.grad)
    torch.testing.assert_close(wide.bias.grad, plain.bias.grad)
    with torch.inference_mode():
        torch.testing.assert_close(wide(inputs), plain(inputs))
