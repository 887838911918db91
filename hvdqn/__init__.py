"""hvdqn: one deep Q-network trained on many ranks.

    result = hvdqn.train(env="CartPole-v1", total_env_steps=50_000)
    policy = hvdqn.load(result.run_dir)
    action = policy.act(observation)

The names in `__all__` are the public API, see docs/api.md. Each is imported when it is first used: `import hvdqn` alone
does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hvdqn.api import Result
    from hvdqn.callbacks import Callback, Run
    from hvdqn.config import Config
    from hvdqn.errors import UserError
    from hvdqn.policy import Policy, load
    from hvdqn.train import train_here as train

__version__ = "0.1.0"

_MODULES = {
    "Callback": "hvdqn.callbacks",
    "Config": "hvdqn.config",
    "Policy": "hvdqn.policy",
    "Result": "hvdqn.api",
    "Run": "hvdqn.callbacks",
    "UserError": "hvdqn.errors",
    "load": "hvdqn.policy",
    "train": "hvdqn.train",
}

__all__ = ["Callback", "Config", "Policy", "Result", "Run", "UserError", "__version__", "load", "train"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module 'hvdqn' has no attribute '{name}'")
    module = importlib.import_module(_MODULES[name])
    if name == "train":  # the module itself can be called
        return module
    globals()[name] = found = getattr(module, name)
    return found


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
