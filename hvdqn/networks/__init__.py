"""Build Q-networks from a torso (observation to features) and a head (features to Q-values), and run their passes."""

from __future__ import annotations

from hvdqn.networks.heads import Head
from hvdqn.networks.network import QNetwork, make_network
from hvdqn.networks.passes import Passes, make_passes
from hvdqn.networks.torsos import Images

__all__ = ["Head", "Images", "Passes", "QNetwork", "make_network", "make_passes"]
