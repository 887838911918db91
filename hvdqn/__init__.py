"""hvdqn: one deep Q-network trained on many ranks."""

__version__ = "0.1.0"
