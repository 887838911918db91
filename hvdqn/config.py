"""What a run is: frozen dataclasses that become flags, YAML and checks.

Every field is one flag (`--total-env-steps`) and one key of `config.yaml` (`total_env_steps`).
Precedence: defaults < `--preset` < `--config FILE.yaml` < flags. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import io
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, TypeVar

import tyro
import yaml
from tyro import MISSING_NONPROP
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from hvdqn.errors import UserError
from hvdqn.presets import ALGORITHMS, JOINED, PRESETS

T = TypeVar("T")


@dataclass(frozen=True)
class EnvironmentConfig:
    """Which environment, and how many of it."""

    env: str = "CartPole-v1"
    """A Gymnasium id with a Discrete action space, or `module:id` (the module is imported first)."""
    env_kwargs: str = "{}"
    """JSON object handed to the environment's constructor."""
    wrapper: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """`module:attribute`, called with each single environment. May be repeated; applied in order."""
    envs_per_rank: int = 8
    """Environments that one rank steps."""
    vectorization: Literal["auto", "native", "sync", "async"] = "auto"
    """The environment's own vector, one process, or one process an environment. `auto`: own, else sync."""
    frame_stack: int = 1
    """Frames an observation is made of."""
    clip_rewards: bool = False
    """Clip the rewards learned from to [-1, 1]. Reported returns stay raw."""
    episodic_life: bool = False
    """Atari: a lost life ends the episode while training, never in evaluation."""


@dataclass(frozen=True)
class ExplorationConfig:
    """How actions are explored."""

    exploration: Literal["linear", "ladder", "noisy", "softmax"] = "linear"
    """`linear`: epsilon falls in a line. `ladder`: each environment of the job has an epsilon of its own, from
    `ladder_epsilon` down. `noisy`: no random actions, the network's noise explores (with `noisy`). `softmax`: as
    linear, but in place of the greedy action one is drawn from softmax(q / temperature)."""
    epsilon_start: float = 1.0
    """Share of random actions at the first env step."""
    epsilon_end: float = 0.05
    """Share of random actions once annealed."""
    exploration_env_steps: int = 10_000
    """Global env steps over which epsilon falls linearly."""
    epsilon_repeat: float = 0.0
    """A random action is taken n times, n drawn with a chance in proportion to n to the power of minus this (2 in
    Dabney et al. 2021, "ez-greedy"); 0: once."""
    ladder_epsilon: float = 0.4
    """Ladder: epsilon of environment i of N is this to the power 1 + ladder_alpha x i / (N - 1)."""
    ladder_alpha: float = 7.0
    """Ladder: how much greedier the last environment is than the first."""
    temperature: float = 0.03
    """Softmax: of the policy that acts, in units of return."""


@dataclass(frozen=True)
class ReplayConfig:
    """What is remembered, and how often it is learned from."""

    replay_capacity: int = 100_000
    """Transitions held by the whole job; a rank holds capacity / size."""
    learning_starts: int = 1_000
    """Global env steps before the first update."""
    replay_ratio: float = 8.0
    """Transitions learned from per env step."""
    replay_device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where observations are kept, and minibatches stacked: in the host's memory or on the rank's GPU; `auto`: there if
    it learns and they take no more than half of its free memory."""
    batch_per_rank: int = 32
    """Transitions in one rank's minibatch. Global batch = size x batch_per_rank."""
    n_step: int = 1
    """Rewards summed before bootstrapping."""
    replay: Literal["uniform", "prioritized"] = "uniform"
    """How a rank draws from its shard: all alike, or in proportion to how wrong they were."""
    priority_alpha: float = 0.5
    """Prioritized: the power of the TD error that is the priority; 0 is uniform."""
    priority_beta: float = 0.4
    """Prioritized: strength of the importance weights at the start; it rises to 1 over the run's env steps."""


@dataclass(frozen=True)
class NetworkConfig:
    """The Q-network."""

    torso: str = "auto"
    """`mlp`, `nature`, `impala`, `minatar`, or `module:attribute`: a class of your own, called with the shape of one
    observation. `auto` looks at the observation: vectors mlp, large images nature, small images minatar."""
    hidden: tuple[int, ...] = (120, 84)
    """Units of the fully connected layers (after the convolutions, if any)."""
    head: Literal["scalar", "c51", "qr", "iqn"] = "scalar"
    """What is learned of each action's return: its mean, probabilities of fixed returns, fixed or sampled quantiles."""
    dueling: bool = False
    """Value and advantages in streams of their own, which share all but the last hidden layer."""
    noisy: bool = False
    """Learned noise on the weights of the last hidden layer and the output, drawn anew at every pass."""
    noisy_sigma: float = 0.5
    """Noisy: how strong the noise begins."""
    layer_norm: bool = False
    """Normalise before every ReLU."""
    center_images: bool = False
    """Subtract from each image the mean of its pixels, so that what moves is not drowned by the background."""
    atoms: int = 51
    """c51: number of fixed returns."""
    v_min: float = -10.0
    """c51: the least return that can be told from others, discounted and as learned from (clipped rewards)."""
    v_max: float = 10.0
    """c51: the largest."""
    quantiles: int = 200
    """qr: number of quantiles."""
    iqn_samples: int = 64
    """iqn: quantiles drawn of each prediction (N)."""
    iqn_target_samples: int = 64
    """iqn: quantiles drawn of each backed-up return (N')."""
    iqn_policy_samples: int = 32
    """iqn: quantiles that actions are chosen by (K)."""
    iqn_embedding: int = 64
    """iqn: cosines that a fraction is told by."""


@dataclass(frozen=True)
class LearningConfig:
    """From a minibatch to a step."""

    gamma: float = 0.99
    """Discount per env step."""
    double: bool = True
    """Double DQN: the online network picks the action that the target network values."""
    loss: Literal["huber", "mse"] = "huber"
    """Loss of the TD error. c51 has its own; quantiles take Huber's."""
    munchausen: bool = False
    """Add the scaled log-policy of the action taken to its reward, and bootstrap from the softmax policy."""
    munchausen_alpha: float = 0.9
    """Munchausen: share of the log-policy that is added."""
    munchausen_temperature: float = 0.03
    """Munchausen: of the softmax policy, in units of return."""
    munchausen_clip: float = -1.0
    """Munchausen: the least that the log-policy times its temperature counts."""
    optimizer: Literal["adam", "rmsprop", "sgd"] = "adam"
    """Optimizer, over one flat tensor."""
    lr: float = 2.5e-4
    """Learning rate at the reference batch."""
    optimizer_eps: float = 1e-8
    """Epsilon of Adam or RMSProp."""
    optimizer_eps_scaling: Literal["none", "inverse"] = "none"
    """`inverse`: divide optimizer_eps by k = global batch / lr_reference_batch, for distributional heads."""
    lr_scaling: Literal["none", "sqrt", "linear"] = "sqrt"
    """How the learning rate grows with k = global batch / lr_reference_batch (sqrt is capped at 3)."""
    lr_reference_batch: int = 0
    """Global batch at which `lr` was tuned; 0: batch_per_rank, that is, one rank."""
    lr_warmup: float = 0.02
    """Share of the run over which a scaled learning rate rises from `lr`."""
    lr_final: float = 1.0
    """Share of the learning rate that is left at the end of the run, approached linearly."""
    max_grad_norm: float = 10.0
    """Norm to which the averaged gradient is clipped; 0: no clipping."""
    target_every: int = 1_000
    """Global env steps between hard target syncs, each of which also checks the ranks for drift."""
    target_tau: float = 1.0
    """Below 1: in place of hard copies the target follows, by this share at every update of the reference batch."""
    max_skipped_updates: int = 10
    """Updates skipped in a row for a non-finite gradient before the run gives up."""


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks talk and agree."""

    comm: Literal["auto", "local", "horovod", "torch", "mpi"] = "auto"
    """Engine; `auto` reads the launcher's environment."""
    sync: Literal["gradients", "parameters", "server"] = "gradients"
    """What the ranks agree on. `gradients`: averaged at every update. `parameters`: each rank takes its own steps, and
    weights and moments are averaged every `sync_every` updates. `server`: rank 0 does not act but takes the steps; the
    others push gradients to it and pull weights, without waiting for each other (with `comm mpi`)."""
    sync_every: int = 50
    """Parameters: updates (not env steps) between averages. Checkpoints and evaluations average first."""
    outer_lr: float = 1.0
    """Parameters: learning rate of an outer optimizer that takes the averaged change for its gradient; 1 without
    momentum is the plain average."""
    outer_momentum: float = 0.0
    """Parameters: Nesterov momentum of the outer optimizer."""
    pull_every: int = 1
    """Server: a worker's updates (not env steps) between fresh weights."""
    max_staleness: int = 100
    """Server: a gradient is dropped if more updates than this were taken since its weights were pulled."""
    tolerate_dead_workers: bool = False
    """Server: workers of which nothing is heard for half of `stall_timeout` are left out, and the others go on. The
    launcher must let them: `mpirun --enable-recovery`."""
    overlap: bool = True
    """Environments step while gradients travel. Off: wait first, then step."""
    threads_per_rank: int = 0
    """Threads that a rank may use; 0: cores / ranks on this host. Small networks use one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks live; `auto`: CUDA where there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of the forward passes; parameters and gradients stay fp32."""
    cuda_graphs: bool = False
    """Record an update once as two CUDA graphs, up to the exchange and after it, acting as a third, and replay them. A
    torso of your own must not ask on the host what a tensor holds."""
    stall_timeout: float = 600.0
    """Seconds without progress after which the job is ended and the missing rank named; 0: never."""


@dataclass(frozen=True)
class RunConfig:
    """The run itself. `*_every` counts global env steps; 0 is never."""

    total_env_steps: int = 50_000
    """Global env steps: summed over ranks."""
    seed: int = 1
    """One seed; ranks and uses are spawned from it."""
    run_dir: str = ""
    """Where the run is recorded; empty: runs/<env>-<preset>-seed<seed>-<time>."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Continue from the newest checkpoint of run_dir if there is one; never; or refuse without one."""
    eval_every: int = 0
    """Between evaluations; there is always one at the end."""
    eval_episodes: int = 100
    """Episodes of an evaluation, shared by all ranks."""
    eval_epsilon: float = 0.0
    """Share of random actions in evaluation."""
    checkpoint_every: int = 10_000
    """Between checkpoints; there is always one at the end."""
    checkpoint_keep: int = 3
    """Newest checkpoints kept; the weights of the best evaluation are kept besides."""
    checkpoint_replay: Literal["auto", "yes", "no"] = "auto"
    """Keep replay in checkpoints, for an exact resume. `auto`: if twice of what all that are kept will take is free."""
    log_every: int = 1_000
    """Between lines of metrics.jsonl."""


PRESET_HELP = (
    "Tuned settings of an environment or an algorithm, or of both joined by a comma, as atari,rainbow; "
    f"--help beside it shows what they set. There are {', '.join(PRESETS)}."
)


@dataclass(frozen=True)
class Config:
    """Train one deep Q-network on all ranks of the job."""

    preset: Annotated[str, tyro.conf.arg(help=PRESET_HELP)] = ""
    config: str = ""
    """YAML file with the same keys as the flags."""
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    exploration: ExplorationConfig = field(default_factory=ExplorationConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    learning: LearningConfig = field(default_factory=LearningConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def flat(self) -> dict[str, Any]:
        """All settings by flag name, sections dissolved, ready for YAML."""
        settings: dict[str, Any] = {"preset": self.preset}
        for section in _sections(self).values():
            for name, value in dataclasses.asdict(section).items():
                settings[name] = list(value) if isinstance(value, tuple) else value
        return settings

    def replace(self, **settings: Any) -> Config:
        """A copy with some settings changed, each by its flag name.

        Raises:
            UserError: a name is no setting.
        """
        changed: dict[str, Any] = {}
        for name, value in settings.items():
            section = _section_of(name)
            if section == "":
                changed[name] = value
            else:
                changed[section] = dataclasses.replace(
                    changed.get(section, getattr(self, section)), **{name: value}
                )
        return dataclasses.replace(self, **changed)


def _sections(config: Config) -> dict[str, Any]:
    return {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if dataclasses.is_dataclass(getattr(config, f.name))
    }


def _section_of(name: str) -> str:
    """The section that holds a setting; "" for `preset` and `config` themselves."""
    default = Config()
    if name in ("preset", "config"):
        return ""
    for section, values in _sections(default).items():
        if hasattr(values, name):
            return section
    known = [*default.flat(), "config"]
    raise UserError(f"unknown setting '{name}'{did_you_mean(name, known)}; see --help for all of them")


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'a' or 'b'?`, or nothing where nothing is near."""
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""


def import_module(module: str, flag: str) -> ModuleType:
    """A module that the user named with a flag.

    Raises:
        UserError: it cannot be imported.
    """
    if not all(part.isidentifier() for part in module.split(".")):
        raise UserError(f"{flag}: '{module}' is no module's name; write package.module, without path and .py")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{flag}: cannot import '{module}' ({' '.join(str(error).split())}); install it or put it on PYTHONPATH"
        ) from error


def import_attribute(path: str, flag: str) -> Any:
    """What `module:attribute` names.

    Raises:
        UserError: it cannot be imported, or names nothing.
    """
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise UserError(f"{flag} '{path}' is not of the form module:attribute")
    found = getattr(import_module(module, f"{flag} '{path}'"), attribute, None)
    if found is None:
        raise UserError(f"{flag} '{path}': module '{module}' has no '{attribute}'")
    return found


def parse(argv: Sequence[str], prog: str = "python -m hvdqn.train") -> Config:
    """The run that a command line asks for, checked as far as one process can.

    Raises:
        UserError: something in it is wrong.
        SystemExit: 0 after `--help`.
    """
    for flag, remedy in (
        ("--preset", "join them by comma, as in minatar,rainbow"),
        ("--config", "give one file"),
    ):
        if sum(word.split("=")[0] == flag for word in argv) > 1:
            raise UserError(f"{flag} is given twice; {remedy}")
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--preset", default="")
    early.add_argument("--config", default="")
    with contextlib.suppress(argparse.ArgumentError):  # a flag without its value: tyro says it better
        names, _ = early.parse_known_args(list(argv))
        file_settings = read_config_file(names.config) if names.config else {}
        default = preset_config(names.preset or str(file_settings.pop("preset", "")))
        if any(word.split("=")[0] == "--wrapper" for word in argv):
            file_settings.pop("wrapper", None)  # flags win over the file; tyro alone would append
        if file_settings:
            with _blaming(names.config):
                default = parse_flags(Config, _as_flags(file_settings), prog, default)
        config = dataclasses.replace(parse_flags(Config, argv, prog, default), config="")
        given = {word.split("=")[0] for word in argv}
        in_file = {"--" + name.replace("_", "-") for name in file_settings} - given
        with _blaming(names.config, in_file):
            check(config)
        return config
    return parse_flags(Config, argv, prog)


@contextlib.contextmanager
def _blaming(path: str, flags: Collection[str] | None = None) -> Iterator[None]:
    """Say of what is wrong that it stands in this file; where flags are given, only if one of them is named."""
    try:
        yield
    except UserError as error:
        if flags is not None and not set(str(error).split()) & set(flags):
            raise
        raise UserError(f"in the config file '{path}': {error}") from None


_REGISTRY = ConstructorRegistry()


@_REGISTRY.primitive_rule
def _whole_numbers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
    """Whole numbers as people write large ones: 1000000, 1_000_000, 1e6."""
    if info.type is not int:
        return None

    def read(words: Sequence[str]) -> int:
        with contextlib.suppress(ValueError, OverflowError):
            number = float(words[0])
            if "e" in words[0].lower() and number == int(number):
                return int(number)
            return int(words[0])
        raise ValueError(f"'{words[0]}' is no whole number")

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    )


def parse_flags(kind: type[T], argv: Sequence[str], prog: str, default: T | None = None) -> T:
    """A dataclass from a command line; every mistake is one line.

    Raises:
        UserError: an unknown argument, or a value that does not parse.
        SystemExit: 0 after `--help`.
    """
    out, err = io.StringIO(), io.StringIO()
    parsed: T
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            parsed, unknown = tyro.cli(
                kind,
                prog=prog,
                args=list(argv),
                default=MISSING_NONPROP if default is None else default,
                return_unknown_args=True,
                config=(tyro.conf.OmitArgPrefixes,),
                registry=_REGISTRY,
            )
    except SystemExit as stop:
        if stop.code == 0:
            try:
                print(out.getvalue(), flush=True)
            except BrokenPipeError:  # as in `--help | head`; Python flushes once more at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise
        raise UserError(_one_line(err.getvalue())) from None
    if unknown:
        word = unknown[0].split("=")[0]
        if flag := _switch_before(word, argv, kind):
            raise UserError(f"{flag} takes no value; write {flag} or --no-{flag[2:]}")
        raise UserError(
            f"unknown argument '{word}'{did_you_mean(word, _flags_of(kind))}; see --help for all flags"
        )
    return parsed


def _switch_before(word: str, argv: Sequence[str], kind: Any) -> str:
    """The switch that this word was given to as if it were its value, or ""."""
    if word.lower() not in ("true", "false", "yes", "no", "on", "off", "0", "1"):
        return ""
    switches = _flags_of(kind, "bool")
    given = [*argv, ""]
    return next((s for s in switches if f"{s}={word}" in given or (s, word) in itertools.pairwise(given)), "")


def _flags_of(kind: Any, only: str = "") -> list[str]:
    """The flags of a dataclass of settings; only those of one type, if it is named."""
    flags: list[str] = []
    for f in dataclasses.fields(kind):
        nested: Any = f.default_factory
        if dataclasses.is_dataclass(nested):
            flags += _flags_of(nested, only)
        elif only in ("", f.type):
            flags.append("--" + f.name.replace("_", "-"))
    return flags


def _one_line(boxed: str) -> str:
    """The first paragraph of tyro's framed message, without its frame."""
    lines = [re.sub(r"[│╭╰╮╯]", "", line).strip() for line in boxed.splitlines()]
    rules = [i for i, line in enumerate(lines) if re.fullmatch(r"[-─]{4,}", line)]
    first = rules[0] + 1 if rules else 0
    body = lines[first : rules[1] if len(rules) > 1 else len(lines)]
    said = " ".join(" ".join(body).split()) or "the command line cannot be understood; see --help"
    return said.replace(
        "Could not find valid parse for arguments:", "give whole numbers with blanks between, as 64 64, not"
    )


def _as_flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings of a file as the flags that say the same, so that one parser checks both.

    Raises:
        UserError: no flag says it.
    """
    argv: list[str] = []
    defaults = Config().flat()
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(defaults.get(name), bool):
            if not isinstance(value, bool):
                raise UserError(f"{name} is {value!r}; it must be true or false")
            argv.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, bool):
            # YAML takes for such what are words of --checkpoint-replay.
            argv.append(f"{flag}={'yes' if value else 'no'}")
        elif name == "wrapper":
            wrappers = value if isinstance(value, (list, tuple)) else [value]
            argv += [word for item in wrappers for word in (flag, str(item))]
        elif isinstance(value, (list, tuple)):
            argv += [flag, *map(str, value)]
        elif isinstance(value, dict):
            try:
                argv.append(f"{flag}={json.dumps(value)}")
            except TypeError as error:  # YAML reads a date as one
                raise UserError(f"{name} holds what JSON cannot: {error}; put it in quotes") from None
        else:
            argv.append(f"{flag}={value}")
    return argv


def read_config_file(path: str) -> dict[str, Any]:
    """A YAML mapping of settings by flag name; what it leaves empty stays as it was.

    Raises:
        UserError: unreadable, no mapping, or a key that is no setting.
    """
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a UTF-8 text"
        raise UserError(f"cannot read the config file '{path}': {reason}; give a YAML file") from None
    except (yaml.YAMLError, ValueError) as error:  # the latter of a day that no month has
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where is not None else ""
        raise UserError(
            f"the config file '{path}' is not valid YAML{line}; write one 'key: value' a line"
        ) from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"the config file '{path}' holds no mapping; write one 'key: value' a line")
    settings = {str(key).replace("-", "_"): value for key, value in loaded.items()}
    with _blaming(path):
        for name in settings:
            _section_of(name)
    settings.pop("config", None)
    return {name: value for name, value in settings.items() if value is not None}


def preset_config(names: str) -> Config:
    """The defaults under one preset or several joined by commas, in whichever order they are named.

    An algorithm's hold over an environment's, and those of `smoke` over both.

    Raises:
        UserError: no such preset, or two that cannot both hold.
    """
    named = list(dict.fromkeys(filter(None, map(str.strip, names.split(",")))))
    for name in named:
        if name not in PRESETS:
            raise UserError(
                f"unknown preset '{name}'{did_you_mean(name, list(PRESETS))}; there are {', '.join(PRESETS)}"
            )
    algorithms = [name for name in named if name in ALGORITHMS]
    environments = [name for name in named if name not in (*algorithms, "smoke")]
    for kind in (environments, algorithms):
        if len(kind) > 1:
            raise UserError(
                f"--preset {names}: {kind[0]} and {kind[1]} cannot both hold; join an environment's with an "
                "algorithm's, as atari,rainbow"
            )
    settings: dict[str, Any] = {}
    for name in (*environments, *algorithms):
        settings.update(PRESETS[name])
    for pair, joined in JOINED.items():
        if set(pair) <= set(named):
            settings.update(joined)
    if "smoke" in named:
        settings.update(PRESETS["smoke"])
    return Config(preset=",".join(named)).replace(**settings)


def as_yaml(config: Config) -> str:
    """All settings; fed back with `--config` they repeat the run, in a directory of its own."""
    settings = {name: value for name, value in config.flat().items() if name not in ("run_dir", "resume")}
    return yaml.safe_dump(settings, sort_keys=False)


_AT_LEAST_ONE = (
    "envs_per_rank", "frame_stack", "replay_capacity", "batch_per_rank", "n_step", "total_env_steps",
    "eval_episodes", "checkpoint_keep", "max_skipped_updates", "quantiles", "iqn_samples", "iqn_target_samples",
    "iqn_policy_samples", "iqn_embedding", "sync_every", "pull_every",
)  # fmt: skip
_NOT_NEGATIVE = (
    "exploration_env_steps", "learning_starts", "lr_reference_batch", "max_grad_norm", "target_every",
    "threads_per_rank", "seed", "stall_timeout", "eval_every", "checkpoint_every", "log_every", "noisy_sigma",
    "ladder_alpha", "max_staleness",
)  # fmt: skip
_ABOVE_ZERO = ("replay_ratio", "lr", "optimizer_eps", "temperature", "munchausen_temperature", "outer_lr")
_SHARES = (
    "epsilon_start", "epsilon_end", "eval_epsilon", "lr_warmup", "lr_final", "ladder_epsilon", "priority_alpha",
    "priority_beta", "munchausen_alpha",
)  # fmt: skip
# Settings of a part, the setting that chooses it, and the choices under which it is there.
_HEEDED_WITH: tuple[tuple[Sequence[str], str, Sequence[Any]], ...] = (
    (("sync_every", "outer_lr", "outer_momentum"), "sync", ("parameters",)),
    (("pull_every", "max_staleness", "tolerate_dead_workers"), "sync", ("server",)),
    (("priority_alpha", "priority_beta"), "replay", ("prioritized",)),
    (("epsilon_start", "epsilon_end", "exploration_env_steps"), "exploration", ("linear", "softmax")),
    (("ladder_epsilon", "ladder_alpha"), "exploration", ("ladder",)),
    (("temperature",), "exploration", ("softmax",)),
    (("noisy_sigma",), "noisy", (True,)),
    (("atoms", "v_min", "v_max"), "head", ("c51",)),
    (("quantiles",), "head", ("qr",)),
    (("iqn_samples", "iqn_target_samples", "iqn_policy_samples", "iqn_embedding"), "head", ("iqn",)),
    (("munchausen_alpha", "munchausen_temperature", "munchausen_clip"), "munchausen", (True,)),
    (("optimizer_eps", "optimizer_eps_scaling"), "optimizer", ("adam", "rmsprop")),
)
_TORSOS = ("auto", "mlp", "nature", "impala", "minatar")


def check(config: Config) -> None:
    """Whatever can be refused before ranks meet.

    Raises:
        UserError: a value that cannot be right.
    """
    settings = config.flat()
    flag = {name: "--" + name.replace("_", "-") for name in settings}
    for name, value in settings.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag[name]} is {value}; it must be a finite number")
    rules: tuple[tuple[Sequence[str], Callable[[float], bool], str], ...] = (
        (_AT_LEAST_ONE, lambda v: v >= 1, "at least 1"),
        (_NOT_NEGATIVE, lambda v: v >= 0, "0 or more"),
        (_ABOVE_ZERO, lambda v: v > 0, "above 0"),
        (_SHARES, lambda v: 0 <= v <= 1, "within [0, 1]"),
        (("gamma", "target_tau"), lambda v: 0 < v <= 1, "within (0, 1]"),
        (("outer_momentum",), lambda v: 0 <= v < 1, "within [0, 1)"),
        (("frame_stack",), lambda v: v <= 255, "at most 255"),
        (("seed",), lambda v: v < 1 << 63, "below 2^63"),
    )
    for names, holds, rule in rules:
        for name in names:
            if not holds(settings[name]):
                raise UserError(f"{flag[name]} is {settings[name]}; it must be {rule}")
    if any(units < 1 for units in config.network.hidden):
        raise UserError(
            f"--hidden is {' '.join(map(str, config.network.hidden))}; every layer needs at least 1 unit"
        )
    _check_parts(config)
    if config.learning.target_every == 0 and config.learning.target_tau == 1.0:
        raise UserError(
            "--target-every 0 would leave the target network as it began; give env steps or a --target-tau below 1"
        )
    if config.replay.replay_capacity <= config.replay.learning_starts:
        raise UserError(
            f"--replay-capacity {config.replay.replay_capacity} must be above --learning-starts "
            f"{config.replay.learning_starts}, or learning would never start"
        )
    if config.run.total_env_steps <= config.replay.learning_starts:
        raise UserError(
            f"--total-env-steps {config.run.total_env_steps} must be above --learning-starts "
            f"{config.replay.learning_starts}, or learning would never start; raise one or lower the other"
        )


def _check_parts(config: Config) -> None:
    """Parts that do not go together, and settings of one part that cannot be right."""
    network, learning = config.network, config.learning
    torso = network.torso
    if torso not in _TORSOS and ":" not in torso:
        raise UserError(
            f"unknown --torso '{torso}'{did_you_mean(torso, _TORSOS)}; there are {', '.join(_TORSOS)}, or give "
            "module:attribute"
        )
    if network.head == "c51" and (network.atoms < 2 or network.v_min >= network.v_max):
        raise UserError(
            f"--head c51 with --atoms {network.atoms} from --v-min {network.v_min:g} to --v-max {network.v_max:g}; "
            "give at least 2 atoms, and a least return below the largest"
        )
    if network.head != "scalar" and learning.loss == "mse":
        raise UserError(
            f"--loss mse has no meaning for --head {network.head}, whose loss is its own; use --loss huber"
        )
    if learning.munchausen and network.head == "c51":
        raise UserError("--munchausen is not defined for --head c51; use --head scalar, qr or iqn")
    if learning.munchausen and learning.double:
        raise UserError(
            "--munchausen bootstraps from a softmax policy, which leaves --double no action to choose; add --no-double"
        )
    if learning.munchausen_clip > 0:
        raise UserError(f"--munchausen-clip is {learning.munchausen_clip:g}; it must be 0 or less")
    if config.parallel.tolerate_dead_workers and config.parallel.stall_timeout == 0:
        raise UserError(
            "--tolerate-dead-workers needs the watchdog to find them; leave --stall-timeout 0 out, or give seconds"
        )
    if 0 != config.exploration.epsilon_repeat <= 1:
        raise UserError(
            f"--epsilon-repeat is {config.exploration.epsilon_repeat:g}; it must be above 1, or 0 for single actions"
        )
    if config.exploration.exploration == "noisy" and not network.noisy:
        raise UserError(
            "--exploration noisy needs the noise of --noisy; without it no action would be explored"
        )


def unused_settings(config: Config) -> list[str]:
    """A line for each setting that is not the preset's and does nothing, for the part that it belongs to is off."""
    settings, preset = config.flat(), preset_config(config.preset).flat()
    lines = []
    for names, chooser, choices in _HEEDED_WITH:
        if settings[chooser] not in choices:
            ways = " or ".join(
                f"--{chooser}" if choice is True else f"--{chooser} {choice}" for choice in choices
            )
            idle = [name for name in names if settings[name] != preset[name]]
            lines += [f"--{name.replace('_', '-')} does nothing without {ways}" for name in idle]
    return lines


def acting_ranks(config: Config, size: int) -> int:
    """How many of `size` ranks act and learn: all but the one that serves."""
    return size - 1 if config.parallel.sync == "server" else size


def acting_place(config: Config, rank: int) -> int:
    """This rank's place among them; that of the one that serves is of no account."""
    return max(rank - 1, 0) if config.parallel.sync == "server" else rank


def check_engine(config: Config, engine: str, size: int) -> None:
    """What `--sync` asks of the ranks' connection.

    Raises:
        UserError: this engine cannot do it, or there is nobody to serve.
    """
    if config.parallel.sync == "server" and (engine != "mpi" or size < 2):
        found = "a single rank" if size < 2 else f"--comm {engine}"
        raise UserError(
            f"--sync server works between 2 or more ranks over plain MPI, not with {found}; start it with "
            "'mpirun -np N python -m hvdqn.train --comm mpi --sync server', N of 2 or more, or use another --sync"
        )


def check_world(config: Config, size: int) -> None:
    """What depends on how many ranks there are.

    Raises:
        UserError: the shards are too small for this many ranks, or a ladder has one rung.
    """
    acting = acting_ranks(config, size)
    if config.exploration.exploration == "ladder" and acting * config.environment.envs_per_rank < 2:
        raise UserError(
            "--exploration ladder spreads its epsilons over environments, and there is one; raise --envs-per-rank"
        )
    shard = config.replay.replay_capacity // acting
    rows = shard // config.environment.envs_per_rank
    if config.replay.batch_per_rank > shard:
        raise UserError(
            f"--batch-per-rank {config.replay.batch_per_rank} is larger than the replay shard of a rank, {shard} "
            f"(--replay-capacity {config.replay.replay_capacity} over {acting} ranks); lower one or raise the other"
        )
    least = config.replay.n_step + config.environment.frame_stack
    if rows < least:
        raise UserError(
            f"--replay-capacity {config.replay.replay_capacity} leaves {rows} transitions for each of "
            f"{acting * config.environment.envs_per_rank} environments; n-step and frame stack need {least}: raise it"
        )
