"""`hvdqn export`: the policy of a run as an ONNX model, as a program of torch.export, or as a policy file.

The model takes observations as the environment returns them, and gives `q_values [batch, actions]` and the greedy
`action [batch, ...]` of the environment. It holds all preprocessing. With a frame stack, an input has the last frames:
`[batch, stack, *shape]`, oldest first. A Dict or Tuple space becomes one input for each of its parts.
"""

from __future__ import annotations

import copy
import logging
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from hvdqn.config import parse_flags
from hvdqn.errors import EXIT_FAILED, EXIT_USER_ERROR, UserError
from hvdqn.networks.wide import WideLinear
from hvdqn.paths import absolute, folder_remembered
from hvdqn.policy import Policy, load_trusted

FORMATS = (".onnx", ".pt2", ".safetensors")
OBSERVATIONS = 1000
# Of a Q-value, relative to the largest one. Both compute in float32 and add in another order.
TOLERANCE = 1e-4

Leaves = Sequence[tuple[str, gym.Space[Any]]]


@dataclass(frozen=True)
class ExportOptions:
    """Write the policy of a run as a model for other programs, and check it against the policy."""

    path: Annotated[Path, tyro.conf.Positional]
    """A run directory (its newest checkpoint), a checkpoint such as `checkpoints/best`, or a policy file."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """File to write: .onnx, .pt2 (torch.export) or .safetensors (a policy file of hvdqn)."""
    trust: bool = False
    """Import the code that the run names, its own torso."""
    torso: str = ""
    """Allows to import the run's `--torso module:attribute`, if it is this one."""


class ExportedPolicy(nn.Module):
    """The network of a policy with its preprocessing, as one module.

    Args:
        policy: to export.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.network = copy.deepcopy(policy.network).cpu()
        for module in self.network.modules():
            if isinstance(module, WideLinear):  # oneDNN's tensors exist on CPUs only, and not in a model
                module.__class__ = nn.Linear  # type: ignore[assignment]
            if isinstance(module, nn.AdaptiveMaxPool2d):
                module.__class__ = SlicedMaxPool
        self.leaves = [space for _, space in leaves(policy.observation_space)]
        self.is_box = isinstance(policy.observation_space, spaces.Box)
        self.stacked = int(policy.config.environment.frame_stack > 1)
        self.shape = policy.spaces.observation_shape
        self.dtype = getattr(torch, policy.spaces.observation_dtype)
        self.exists = _tensor(policy.actions.exists)
        self.values, self.action_shape = _tensor(policy.actions.values), policy.actions.space_shape

    def forward(self, *observation: Tensor) -> tuple[Tensor, Tensor]:
        """Map parts of observations `[batch, (stack,) ...]` to Q-values and the environment's actions, as `Policy`."""
        lead = 1 + self.stacked
        flat = [self._flat(space, part, lead) for space, part in zip(self.leaves, observation, strict=True)]
        whole = flat[0] if self.is_box else torch.cat(flat, dim=lead)
        q = self.network.q_values(whole.reshape(*whole.shape[:lead], *self.shape))
        action = (q if self.exists is None else q.masked_fill(~self.exists, -math.inf)).argmax(dim=-1)
        if self.values is not None:
            first = torch.arange(
                0, self.values.numel(), self.values.shape[-1]
            )  # place of each dimension's values
            action = self.values.flatten()[action + first]
            action = torch.unflatten(action, 1, self.action_shape) if self.action_shape else action
        return q, action

    def _flat(self, space: gym.Space[Any], part: Tensor, lead: int) -> Tensor:
        """Return a part of the observation as numbers `[batch, (stack,) numbers]`, as Gymnasium flattens it."""
        if isinstance(space, spaces.Discrete):
            return functional.one_hot(part - int(space.start), int(space.n)).to(self.dtype)
        if isinstance(space, spaces.MultiDiscrete):
            columns = (part - torch.as_tensor(space.start)).flatten(lead).unbind(lead)
            sizes = space.nvec.ravel().tolist()
            return torch.cat(
                [functional.one_hot(c, n) for c, n in zip(columns, sizes, strict=True)], lead
            ).to(self.dtype)
        return part.flatten(lead).to(self.dtype) if part.ndim > lead else part.unsqueeze(lead).to(self.dtype)


class SlicedMaxPool(nn.AdaptiveMaxPool2d):
    """Computes adaptive max-pooling as the largest numbers of slices, because ONNX has no such operation."""

    def forward(self, planes: Tensor) -> Tensor:
        """Map planes `[batch, channels, H, W]` to `[batch, channels, *output_size]`."""
        sizes = self.output_size if isinstance(self.output_size, tuple) else (self.output_size,) * 2
        for dim, size in zip((2, 3), sizes, strict=True):
            if size is not None:  # it stands for the size of the input
                n = planes.shape[dim]
                slices = [(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
                largest = [planes.narrow(dim, start, end - start).amax(dim) for start, end in slices]
                planes = torch.stack(largest, dim)
        return planes


def _tensor(array: NDArray[Any] | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array)


def leaves(space: gym.Space[Any], name: str = "observation") -> Leaves:
    """Return the parts of an observation space that are no Dict or Tuple, with a name for each, in flattened order."""
    if isinstance(space, spaces.Dict):
        return [leaf for key, part in space.items() for leaf in leaves(part, f"{name}_{key}")]
    if isinstance(space, spaces.Tuple):
        return [leaf for index, part in enumerate(space) for leaf in leaves(part, f"{name}_{index}")]
    return [(name, space)]


def sample(policy: Policy, count: int, rng: np.random.Generator) -> list[NDArray[Any]]:
    """Return random observations for an exported policy, one array `[count, (stack,) ...]` for each of its inputs."""
    depth = policy.config.environment.frame_stack
    stack = (depth,) if depth > 1 else ()
    arrays = []
    for _, space in leaves(policy.observation_space):
        shape = (count, *stack, *(space.shape or ()))
        if isinstance(space, spaces.Discrete):
            array = rng.integers(space.start, space.start + space.n, shape)
        elif isinstance(space, spaces.MultiDiscrete):
            array = space.start + rng.integers(0, space.nvec, shape)
        elif isinstance(space, spaces.MultiBinary):
            array = rng.integers(0, 2, shape, np.int8)
        elif space.dtype is not None and space.dtype.kind in "iub":
            array = rng.integers(0, 2 if space.dtype.kind == "b" else 128, shape).astype(space.dtype)
        else:
            array = rng.normal(size=shape).astype(space.dtype)
        arrays.append(array)
    return arrays


def reference(policy: Policy, inputs: Sequence[NDArray[Any]]) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """Return what the policy itself answers to `sample`: Q-values `[batch, actions]` and actions `[batch, ...]`."""
    policy.reset()
    frames = [inputs]
    if policy.is_stacked:
        frames = [[array[:, index] for array in inputs] for index in range(inputs[0].shape[1])]
    for frame in frames[:-1]:
        policy.act(_joined(policy.observation_space, list(frame)))
    newest = _joined(policy.observation_space, list(frames[-1]))
    q, actions = policy.q_values(newest), policy.act(newest)
    policy.reset()
    return q, np.asarray(actions)


def _joined(space: gym.Space[Any], parts: list[Any]) -> Any:
    """Return a batch of observations of a space; takes its parts from the front of a list."""
    if isinstance(space, spaces.Dict):
        return {key: _joined(part, parts) for key, part in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_joined(part, parts) for part in space)
    return parts.pop(0)


def write_model(policy: Policy, path: Path) -> Callable[[Sequence[NDArray[Any]]], Sequence[NDArray[Any]]]:
    """Write the model; return a function that loads it from the file and computes Q-values and actions.

    Raises:
        UserError: a package is missing, or the network cannot be exported.
    """
    model = ExportedPolicy(policy).eval()
    example = tuple(map(torch.from_numpy, sample(policy, 2, np.random.default_rng(0))))
    batch = torch.export.Dim("batch", min=1)
    shapes = (tuple({0: batch} for _ in example),)
    names = [name for name, _ in leaves(policy.observation_space)]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports packages that are not needed
            program = torch.export.export(model, example, dynamic_shapes=shapes)
            if path.suffix == ".pt2":
                torch.export.save(program, path)
            else:
                outputs = ["q_values", "action"]
                torch.onnx.export(
                    program,
                    (),
                    path,
                    input_names=names,
                    output_names=outputs,
                    dynamo=True,
                    verbose=False,
                    external_data=False,
                )
    except ImportError as error:
        raise missing_extra(error) from None
    except OSError as error:
        raise UserError(f"'{path}' cannot be written: {error.strerror}; choose another place") from None
    return _torch_model(path) if path.suffix == ".pt2" else _onnx_model(path, names)


def missing_extra(error: ImportError) -> UserError:
    """Return the message that names the extra."""
    return UserError(f"an .onnx file needs the export extra ({error}); pip install 'hvdqn[export]'")


def _torch_model(path: Path) -> Callable[[Sequence[NDArray[Any]]], Sequence[NDArray[Any]]]:
    module = torch.export.load(path).module()
    return lambda inputs: [output.detach().numpy() for output in module(*map(torch.from_numpy, inputs))]


def _onnx_model(path: Path, names: list[str]) -> Callable[[Sequence[NDArray[Any]]], Sequence[NDArray[Any]]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda inputs: list(session.run(None, dict(zip(names, inputs, strict=True))))


def export(policy: Policy, path: Path) -> str:
    """Write the policy to a file, compare that with the policy, and return what was found in one line.

    Raises:
        UserError: the file cannot be written.
        RuntimeError: the model answers something else than the policy.
    """
    if path.suffix not in FORMATS:
        raise UserError(f"--output '{path}' must end in {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise UserError(f"--output '{path}': there is no folder '{path.parent}'; create it first")
    if path.suffix == ".safetensors":
        policy.save(path)
        return f"{path}: policy of {policy.config.environment.env} after {policy.env_steps:,} env steps"
    if path.suffix == ".onnx":
        try:
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise missing_extra(error) from None
    answer = write_model(policy, path)
    inputs = sample(policy, OBSERVATIONS, np.random.default_rng(1))
    expected, expected_actions = reference(policy, inputs)
    found, actions = answer(inputs)
    difference = float(np.abs(found - expected).max())
    scale = max(1.0, float(np.abs(expected).max()))
    same = int(np.count_nonzero((actions == expected_actions).reshape(OBSERVATIONS, -1).all(axis=1)))
    if not difference <= TOLERANCE * scale or not math.isfinite(difference):
        raise RuntimeError(f"{path} gives Q-values that differ from the policy's by up to {difference:.3g}")
    return (
        f"{path}: on {OBSERVATIONS:,} random observations the largest difference of a Q-value is {difference:.3g}, and "
        f"{same:,} greedy actions are equal"
    )


@folder_remembered()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the `hvdqn export` command; return its exit code."""
    try:
        options = parse_flags(ExportOptions, sys.argv[1:] if argv is None else argv, prog="hvdqn export")
        repeated = [f"--torso {options.torso!r}"] if options.torso else []
        remedy = "give --trust if you trust whoever made it, or repeat its --torso"
        policy = load_trusted(options.path, options.trust, repeated, remedy)
        print(export(policy, absolute(options.output)))
    except UserError as error:
        print(f"hvdqn export: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except RuntimeError as error:
        print(f"hvdqn export: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_FAILED
    return 0
