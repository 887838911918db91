"""Build Q-networks from a torso (observation to features) and a head (features to Q-values), and run their passes."""

from __future__ import annotations

from hvdqn.networks.heads import Head
from hvdqn.networks.network import QNetwork, make_network
from hvdqn.networks.normalize import Normalize
from hvdqn.networks.passes import AutogradPasses, Passes, autograd_passes, make_passes
from hvdqn.networks.sharded import Group, Layout, split_first
from hvdqn.networks.spectral import spectral_layers
from hvdqn.networks.torsos import Images

__all__ = [
    "AutogradPasses",
    "Group",
    "Head",
    "Images",
    "Layout",
    "Normalize",
    "Passes",
    "QNetwork",
    "autograd_passes",
    "make_network",
    "make_passes",
    "spectral_layers",
    "split_first",
]
