"""All settings of a run. Each is declared once, here.

A field is one flag (`--total-env-steps`) and one key of `config.yaml` (`total_env_steps`). Its annotation says what
values it takes, what it needs to have an effect and whether a resumed run may change it (see `hvdqn.config.fields`);
the text below it is its help. Nothing in this package imports torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from hvdqn.config.fields import (
    COMMA_TEXT,
    EXACT_ONLY,
    FIXED,
    INCIDENTAL,
    JSON_TEXT,
    LAUNCH,
    SAME_CURVE,
    Field,
    Needs,
    Note,
    Range,
    above,
    at_least,
    at_most,
    between,
    fields_of,
)
from hvdqn.config.joining import preset_names, preset_settings
from hvdqn.config.names import OTHER_NAMES, did_you_mean
from hvdqn.config.presets import PRESETS
from hvdqn.config.values import json_object, same_value
from hvdqn.errors import UserError

Count = Annotated[int, at_least(1)]
CountOrZero = Annotated[int, at_least(0)]
Share = Annotated[float, between(0, 1)]
Positive = Annotated[float, above(0)]
NEEDS_SCHEDULE = Needs("exploration", "linear", "softmax")
NEEDS_LOCKSTEP = Needs("sync", "gradients", "parameters")
NEEDS_ATOMS = Needs("head", "c51", "hl-gauss")
NEEDS_ADAPTIVE = Needs("optimizer", "adam", "radam", "rmsprop")
NEEDS_IMPALA = Needs("torso", "impala")
NEEDS_REPLAY = Needs("replay", "uniform", "prioritized")
NEEDS_ROLLOUT = Needs("replay", "none")


@dataclass(frozen=True)
class EnvironmentConfig:
    """The environment, and how many copies of it a rank steps."""

    env: Annotated[str, FIXED] = "CartPole-v1"
    """A Gymnasium id, or `module:id` (the module is imported first), or `module:name` of a function or class that makes
    the environment."""
    env_kwargs: Annotated[str, JSON_TEXT, FIXED] = "{}"
    """JSON object of keyword arguments for the environment's constructor."""
    wrapper: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, FIXED] = ()
    """`module:attribute`, called with each single environment. May be repeated; applied in order."""
    action_bins: Annotated[int, Range("0, or 2 or more", low=0, excluded=(1,)), FIXED] = 0
    """Box action spaces: number of values of each dimension, evenly spaced between its bounds, both included."""
    envs_per_rank: Annotated[Count, EXACT_ONLY] = 8
    """Environments that one rank steps."""
    vectorization: Annotated[Literal["auto", "native", "sync", "async"], EXACT_ONLY] = "auto"
    """`native`: the environment's own vector version. `sync`: all environments in one process. `async`: one process for
    each. `auto`: native if there is one, else sync."""
    frame_stack: Annotated[Count, at_most(255), FIXED] = 1
    """Number of frames stacked into one observation."""
    clip_rewards: bool = False
    """Clip training rewards to [-1, 1]. Reported returns are not clipped."""
    episodic_life: bool = False
    """Atari: the loss of a life ends the episode in training, but not in evaluation."""


@dataclass(frozen=True)
class ExplorationConfig:
    """How the agent explores."""

    exploration: Literal["linear", "ladder", "noisy", "softmax"] = "linear"
    """`linear`: epsilon-greedy, epsilon falls linearly. `ladder`: each environment of the job has a constant epsilon of
    its own, `ladder_epsilon` or less. `noisy`: no random actions, the network's noise explores (with `noisy`).
    `softmax`: as linear, but the other actions are drawn from softmax(q / temperature) instead of greedily."""
    epsilon_start: Annotated[Share, NEEDS_SCHEDULE] = 1.0
    """Share of random actions at the first env step."""
    epsilon_end: Annotated[Share, NEEDS_SCHEDULE] = 0.05
    """Share of random actions at the end of the schedule."""
    exploration_env_steps: Annotated[CountOrZero, NEEDS_SCHEDULE] = 10_000
    """Global env steps over which epsilon falls linearly."""
    epsilon_repeat: float = 0.0
    """Repeat a random action n times, where n has probability proportional to n to the power of minus this (2 in Dabney
    et al. 2021, "ez-greedy"). 0: do not repeat."""
    ladder_epsilon: Annotated[Share, Needs("exploration", "ladder")] = 0.4
    """Ladder: epsilon of environment i of N is this to the power 1 + ladder_alpha x i / (N - 1)."""
    ladder_alpha: Annotated[float, at_least(0), Needs("exploration", "ladder")] = 7.0
    """Ladder: how much greedier the last environment is than the first; see `ladder_epsilon`."""
    temperature: Annotated[Positive, Needs("exploration", "softmax")] = 0.03
    """Softmax: temperature of the policy that acts, in units of return."""


@dataclass(frozen=True)
class ReplayConfig:
    """The replay memory, and how often the agent learns from it."""

    replay_capacity: Annotated[Count, NEEDS_REPLAY, EXACT_ONLY] = 100_000
    """Transitions held by the whole job; a rank holds capacity / size."""
    learning_starts: Annotated[CountOrZero, NEEDS_REPLAY] = 1_000
    """Global env steps before the first update."""
    replay_ratio: Annotated[Positive, NEEDS_REPLAY] = 8.0
    """Transitions sampled for learning per env step."""
    replay_device: Annotated[Literal["auto", "cpu", "cuda"], LAUNCH, SAME_CURVE] = "auto"
    """Keep observations and build minibatches in the host's memory or on the rank's GPU. `auto`: on the GPU if the rank
    learns there and they take at most half of its free memory."""
    batch_per_rank: Annotated[Count, NEEDS_REPLAY] = 32
    """Transitions in one rank's minibatch. Global batch = size x batch_per_rank."""
    n_step: Annotated[Count, NEEDS_REPLAY] = 1
    """Rewards summed before bootstrapping."""
    replay: Annotated[Literal["uniform", "prioritized", "none"], FIXED] = "uniform"
    """How a rank samples from its shard: uniformly, or in proportion to each transition's TD error. `none`: learn from
    rollouts of many environments with Q(lambda), without replay and target network (PQN)."""
    rollout_steps: Annotated[int, at_least(2), NEEDS_ROLLOUT, EXACT_ONLY] = 32
    """Rollouts: steps of each environment between updates."""
    td_lambda: Annotated[Share, NEEDS_ROLLOUT] = 0.65
    """Rollouts: lambda of the returns; 0: one-step targets, 1: no bootstrapping before the end of the rollout."""
    epochs: Annotated[Count, NEEDS_ROLLOUT, EXACT_ONLY] = 2
    """Rollouts: how often each transition is learned from."""
    minibatches: Annotated[Count, NEEDS_ROLLOUT, EXACT_ONLY] = 4
    """Rollouts: minibatches of one rank per epoch, each of envs_per_rank x rollout_steps / minibatches transitions."""
    priority_alpha: Annotated[Share, Needs("replay", "prioritized")] = 0.5
    """Prioritized: the priority is the TD error to this power; 0 is uniform."""
    priority_beta: Annotated[Share, Needs("replay", "prioritized")] = 0.4
    """Prioritized: exponent of the importance weights at the start; it rises to 1 over the run's env steps."""


@dataclass(frozen=True)
class NetworkConfig:
    """The Q-network."""

    torso: Annotated[str, FIXED] = "auto"
    """`mlp`, `nature`, `impala`, `minatar`, or `module:attribute`: your own class, called with the shape of one
    observation. `auto`: mlp for vectors and for images narrower than 3 pixels, nature for large
    images, minatar for small ones."""
    torso_width: Annotated[Count, NEEDS_IMPALA, FIXED] = 1
    """impala: multiplies the number of filters of every convolution."""
    torso_pool: Annotated[CountOrZero, NEEDS_IMPALA, FIXED] = 0
    """impala: max-pool the last planes to this many rows and columns, whatever the size of images; 0: do not pool."""
    spectral_norm: Annotated[bool, NEEDS_IMPALA, FIXED] = False
    """impala: divide the weight of each convolution in residual blocks by its largest singular value."""
    hidden: Annotated[tuple[int, ...], Range("at least 1 unit in every layer", low=1), FIXED] = (120, 84)
    """Units of the fully connected layers (after the convolutions, if any)."""
    head: Annotated[Literal["scalar", "c51", "hl-gauss", "qr", "iqn"], FIXED] = "scalar"
    """What the network predicts of each action's return. `scalar`: the mean. `c51`: probabilities of fixed returns.
    `hl-gauss`: the mean, by classification into bins. `qr`: fixed quantiles. `iqn`: sampled quantiles."""
    normalize_observations: Annotated[bool, FIXED] = False
    """Vector observations: subtract their mean and divide by their standard deviation, clipped to [-10, 10]. Both are
    those of all ranks' observations so far; evaluations do not change them."""
    dueling: Annotated[bool, FIXED] = False
    """Separate streams for value and advantages, which share all but the last hidden layer."""
    noisy: Annotated[bool, FIXED] = False
    """Learned noise on the weights of the last hidden layer and the output, drawn again at every forward pass."""
    noisy_sigma: Annotated[float, at_least(0), Needs("noisy", True)] = 0.5
    """Noisy: initial scale of the noise."""
    layer_norm: Annotated[bool, FIXED] = False
    """Layer normalization before every ReLU."""
    center_images: Annotated[bool, FIXED] = False
    """Subtract the mean of its pixels from each image, so that a bright background does not dominate."""
    atoms: Annotated[int, NEEDS_ATOMS, FIXED] = 51
    """c51: number of fixed returns. hl-gauss: number of bins."""
    v_min: Annotated[float, NEEDS_ATOMS, FIXED] = -10.0
    """c51, hl-gauss: smallest of the returns, discounted (and of clipped rewards, with `clip_rewards`)."""
    v_max: Annotated[float, NEEDS_ATOMS, FIXED] = 10.0
    """c51, hl-gauss: largest of the returns."""
    hl_gauss_sigma: Annotated[Positive, Needs("head", "hl-gauss")] = 0.75
    """hl-gauss: standard deviation of the Gaussian around a target, in widths of a bin."""
    quantiles: Annotated[Count, Needs("head", "qr"), FIXED] = 200
    """qr: number of quantiles."""
    iqn_samples: Annotated[Count, Needs("head", "iqn")] = 64
    """iqn: quantiles sampled for each prediction (N)."""
    iqn_target_samples: Annotated[Count, Needs("head", "iqn")] = 64
    """iqn: quantiles sampled for each target (N')."""
    iqn_policy_samples: Annotated[Count, Needs("head", "iqn")] = 32
    """iqn: quantiles sampled to choose an action (K)."""
    iqn_embedding: Annotated[Count, Needs("head", "iqn"), FIXED] = 64
    """iqn: number of cosines that embed a quantile fraction."""


@dataclass(frozen=True)
class LearningConfig:
    """The loss, the optimizer and the target network."""

    gamma: Annotated[float, between(0, 1, excluded=(0,))] = 0.99
    """Discount per env step."""
    double: Annotated[bool, NEEDS_REPLAY] = True
    """Double DQN: the online network picks the action that the target network evaluates."""
    loss: Literal["huber", "mse"] = "huber"
    """Loss of the TD error. c51 and hl-gauss use cross-entropy; quantile heads use the quantile Huber loss."""
    munchausen: Annotated[bool, NEEDS_REPLAY] = False
    """Add the scaled log-policy of the action taken to its reward, and bootstrap from the softmax policy."""
    munchausen_alpha: Annotated[Share, Needs("munchausen", True)] = 0.9
    """Munchausen: factor of the log-policy that is added."""
    munchausen_temperature: Annotated[Positive, Needs("munchausen", True)] = 0.03
    """Munchausen: temperature of the softmax policy, in units of return."""
    munchausen_clip: Annotated[float, at_most(0), Needs("munchausen", True)] = -1.0
    """Munchausen: lower bound of the log-policy times its temperature."""
    optimizer: Annotated[Literal["adam", "radam", "rmsprop", "sgd"], FIXED] = "adam"
    """Optimizer. It works on one flat tensor of all parameters."""
    lr: Positive = 2.5e-4
    """Learning rate at the reference batch."""
    optimizer_eps: Annotated[Positive, NEEDS_ADAPTIVE] = 1e-8
    """Epsilon of Adam, RAdam or RMSProp."""
    optimizer_eps_scaling: Annotated[Literal["none", "inverse"], NEEDS_ADAPTIVE] = "none"
    """`inverse`: divide optimizer_eps by k = global batch / lr_reference_batch, for distributional heads."""
    lr_scaling: Literal["none", "sqrt", "linear"] = "sqrt"
    """How the learning rate grows with k = global batch / lr_reference_batch (sqrt is capped at 3)."""
    lr_reference_batch: CountOrZero = 0
    """Global batch for which `lr` was tuned; 0: batch_per_rank, which is the global batch of one rank."""
    lr_warmup: Share = 0.02
    """Share of the run over which a scaled learning rate rises from `lr`."""
    lr_final: Share = 1.0
    """Share of the learning rate that is left at the end of the run; it falls linearly."""
    max_grad_norm: Annotated[float, at_least(0)] = 10.0
    """Clip the gradient of each optimizer step to this norm; 0: do not clip. It is the average over ranks under
    `gradients`, and that of one rank otherwise."""
    target_every: CountOrZero = 1_000
    """Global env steps between hard target updates, each of which also checks that the ranks agree bit for bit. With
    `replay none`, only the check."""
    target_tau: Annotated[float, between(0, 1, excluded=(0,)), NEEDS_REPLAY] = 1.0
    """Below 1: no hard copies. The target moves toward the online network by this share per update at the reference
    batch."""
    max_skipped_updates: Count = 10
    """The run gives up after this many updates in a row were skipped because of a non-finite gradient."""


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks are connected and how they keep their networks in agreement."""

    comm: Annotated[Literal["auto", "local", "horovod", "torch", "mpi"], LAUNCH, SAME_CURVE] = "auto"
    """Communication library; `auto` chooses by the launcher's environment variables."""
    host_sum: Annotated[Literal["auto", "on", "off"], LAUNCH, SAME_CURVE] = "auto"
    """Ranks of one host sum gradients through shared memory, and `comm` connects one rank of each host. `auto`: if they
    can. `off`: `comm` does it all, as it does for GPUs and with `sync server`."""
    sync: Annotated[Literal["gradients", "parameters", "server"], FIXED] = "gradients"
    """`gradients`: average gradients at every update. `parameters`: each rank takes its own optimizer steps; weights
    and moments are averaged every `sync_every` updates. `server`: rank 0 does not act but takes the optimizer steps;
    the other ranks push gradients to it and pull weights, without waiting for each other (with `comm mpi`)."""
    sync_every: Annotated[Count, Needs("sync", "parameters")] = 50
    """Parameters: updates (not env steps) between averages. Checkpoints and evaluations average first."""
    outer_lr: Annotated[Positive, Needs("sync", "parameters"), FIXED] = 1.0
    """Parameters: learning rate of an outer optimizer whose gradient is the averaged change; 1 without momentum is the
    plain average."""
    outer_momentum: Annotated[float, between(0, 1, excluded=(1,)), Needs("sync", "parameters"), FIXED] = 0.0
    """Parameters: Nesterov momentum of the outer optimizer."""
    pull_every: Annotated[Count, Needs("sync", "server")] = 1
    """Server: updates (not env steps) of a worker between two pulls of weights."""
    max_staleness: Annotated[CountOrZero, Needs("sync", "server")] = 100
    """Server: drop a gradient if more updates than this were taken since its weights were pulled."""
    tolerate_dead_workers: Annotated[bool, Needs("sync", "server")] = False
    """Server: go on without workers that send nothing for half of `stall_timeout`. The launcher must permit it:
    `mpirun --enable-recovery`."""
    model_parallel: Annotated[Count, EXACT_ONLY, SAME_CURVE] = 1
    """M: each M neighboring ranks hold one network between them: its fully connected layers are split over them. For
    networks that are too large for one rank; with `sync gradients`."""
    overlap: bool = True
    """Step environments while gradients travel. Off: wait for the gradients first."""
    threads_per_rank: Annotated[CountOrZero, LAUNCH, SAME_CURVE] = 0
    """Threads that a rank may use; 0: cores / ranks on this host. Small networks use one."""
    device: Annotated[Literal["auto", "cpu", "cuda"], LAUNCH, SAME_CURVE] = "auto"
    """Device of the networks; `auto`: CUDA if there is a GPU."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of the forward passes; parameters and gradients stay fp32."""
    cuda_graphs: Annotated[bool, SAME_CURVE] = False
    """Record an update as two CUDA graphs (before and after the exchange of gradients) and acting as a third, and
    replay them. Your own torso must then not read tensors on the host."""
    stall_timeout: Annotated[float, at_least(0), SAME_CURVE] = 600.0
    """End the job after this many seconds without progress and name the missing rank; 0: never."""


@dataclass(frozen=True)
class RunConfig:
    """The run itself. `*_every` counts global env steps; 0 is never."""

    total_env_steps: Count = 50_000
    """Global env steps: summed over ranks."""
    seed: Annotated[CountOrZero, Range("below 2^63", high=2**63 - 1), FIXED, SAME_CURVE] = 1
    """Seed of the run. Each rank and each use of random numbers gets a seed derived from it."""
    run_dir: Annotated[str, INCIDENTAL, LAUNCH, SAME_CURVE] = ""
    """Directory of the run; empty: runs/<env>-<preset>-seed<seed>-<time>."""
    resume: Annotated[Literal["auto", "never", "must"], INCIDENTAL, LAUNCH, SAME_CURVE] = "auto"
    """`auto`: continue from the newest checkpoint of run_dir if there is one. `never`: refuse if there is one. `must`:
    refuse if there is none."""
    eval_every: Annotated[CountOrZero, SAME_CURVE] = 0
    """Env steps between evaluations; there is also one at the end, unless `eval_episodes` is 0."""
    eval_episodes: Annotated[CountOrZero, SAME_CURVE] = 100
    """Episodes of an evaluation, shared by all ranks; 0: never evaluate."""
    eval_epsilon: Share = 0.0
    """Share of random actions in evaluation."""
    eval_env: str = ""
    """Another environment for evaluations, with the same observations and actions; empty: that of training."""
    eval_env_kwargs: Annotated[str, JSON_TEXT] = "{}"
    """JSON object of keyword arguments for the environment of evaluations. They are added to `env_kwargs`, unless
    there is an `eval_env`, which has these alone."""
    stop_at_return: Annotated[float | None, SAME_CURVE] = None
    """Stop as soon as the mean return of an evaluation reaches this."""
    checkpoint_every: Annotated[CountOrZero, SAME_CURVE] = 10_000
    """Env steps between checkpoints; there is always one at the end."""
    checkpoint_keep: Annotated[Count, SAME_CURVE] = 3
    """How many of the newest checkpoints are kept; the weights of the best evaluation are kept as well."""
    checkpoint_replay: Annotated[Literal["auto", "yes", "no"], SAME_CURVE] = "auto"
    """Save replay in checkpoints, for an exact resume. `auto`: if the disk has twice the space that all kept
    checkpoints will take."""
    log_every: Annotated[CountOrZero, SAME_CURVE] = 1_000
    """Env steps between lines of metrics.jsonl."""
    log_info: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, NEEDS_LOCKSTEP, SAME_CURVE] = ()
    """Name of a number in the info of an episode's last step; its mean over episodes is logged as `info/NAME`. May be
    repeated. `is_success` is found without it, at the first checkpoint or evaluation."""
    callback: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, SAME_CURVE] = ()
    """`module:attribute`, an `hvdqn.Callback` or a class of them. May be repeated."""
    init_from: Annotated[str, INCIDENTAL] = ""
    """Start with the weights of this run directory, checkpoint or policy file. A resumed run goes on with its own."""
    init_torso_only: Annotated[bool, INCIDENTAL] = False
    """Take only the torso from `init_from`, for another number of actions or another head."""
    prefill: Annotated[str, INCIDENTAL] = ""
    """Fill replay before the first env step, with transitions in an .npz file or in a local dataset, `minari:ID`."""
    track: Annotated[Literal["none", "wandb", "mlflow"], INCIDENTAL, SAME_CURVE] = "none"
    """Also send metrics to Weights & Biases or MLflow, which their own environment variables configure."""


PRESET_HELP = (
    "Tuned settings of an environment or an algorithm, or of both joined by a comma, as atari,rainbow; "
    f"--help beside it shows what they set. There are {', '.join(PRESETS)}."
)


@dataclass(frozen=True)
class Config:
    """Train one deep Q-network on all ranks of the job."""

    preset: Annotated[str, tyro.conf.arg(help=PRESET_HELP), COMMA_TEXT, INCIDENTAL] = ""
    config: str = ""
    """YAML file with the same keys as the flags."""
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    exploration: ExplorationConfig = field(default_factory=ExplorationConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    learning: LearningConfig = field(default_factory=LearningConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def batch_per_rank(self) -> int:
        """Transitions in one rank's minibatch, also with `replay none`, where they follow from the rollout."""
        replay = self.replay
        if replay.replay == "none":
            return self.environment.envs_per_rank * replay.rollout_steps // replay.minibatches
        return replay.batch_per_rank

    def flat(self) -> dict[str, Any]:
        """Return all settings by name, without sections and with lists for tuples, ready for YAML."""
        settings: dict[str, Any] = {}
        for name, declared in SETTINGS.items():
            if name != "config":
                value = getattr(getattr(self, declared.section) if declared.section else self, name)
                settings[name] = list(value) if isinstance(value, tuple) else value
        return settings

    def evaluation_environment(self) -> EnvironmentConfig:
        """Return the environment that evaluations play: that of training, but for `eval_env` and `eval_env_kwargs`.

        Raises:
            UserError: keyword arguments are no JSON object.
        """
        given, environment = json_object("--eval-env-kwargs", self.run.eval_env_kwargs), self.environment
        if not given and not self.run.eval_env:
            return environment
        inherited = {} if self.run.eval_env else json_object("--env-kwargs", environment.env_kwargs)
        kwargs = json.dumps({**inherited, **given})
        env = self.run.eval_env or environment.env
        return dataclasses.replace(environment, env=env, env_kwargs=kwargs, episodic_life=False)

    def replace(self, **settings: Any) -> Config:
        """Return a copy with some settings changed, each by its name.

        Raises:
            UserError: a name is no setting.
        """
        changed: dict[str, Any] = {}
        for name, value in settings.items():
            section = setting(name).section
            if section:
                before = changed.get(section, getattr(self, section))
                changed[section] = dataclasses.replace(before, **{name: value})
            else:
                changed[name] = value
        return dataclasses.replace(self, **changed)


SETTINGS: Mapping[str, Field] = fields_of(Config)
"""All settings by name, with what their annotations declare."""


def setting(name: str) -> Field:
    """Return the declaration of a setting.

    Raises:
        UserError: there is no such setting.
    """
    if name not in SETTINGS:
        near = did_you_mean(name, SETTINGS, OTHER_NAMES)
        raise UserError(f"unknown setting '{name}'{near}; see --help for all of them")
    return SETTINGS[name]


def same_setting(name: str, one: Any, other: Any) -> bool:
    """Return True if two values of the setting with this name mean the same."""
    return same_value(SETTINGS[name], one, other)


def preset_config(presets: str) -> Config:
    """Return the defaults with one preset, or several joined by commas.

    Raises:
        UserError: there is no such preset, or two of them exclude each other.
    """
    return Config(preset=",".join(preset_names(presets))).replace(**preset_settings(presets))


def settings_fixed_on_resume() -> tuple[str, ...]:
    """Return the settings that a resumed run must keep: its seed, environment, network and optimizer."""
    return _settings_with(FIXED)


def settings_of_exact_resume() -> tuple[str, ...]:
    """Return the settings that a resumed run may change, but then it does not continue bit for bit."""
    return _settings_with(EXACT_ONLY)


def incidental_settings() -> tuple[str, ...]:
    """Return the settings that only say how a run is started; a resumed run does not report a change of them."""
    return _settings_with(INCIDENTAL)


def settings_of_one_launch() -> tuple[str, ...]:
    """Return the settings that belong to the launcher and the hosts of one launch, not to the run."""
    return _settings_with(LAUNCH)


def settings_of_same_curve() -> tuple[str, ...]:
    """Return the settings in which runs may differ and still be seeds of one experiment in a plot."""
    return _settings_with(SAME_CURVE)


def _settings_with(note: Note) -> tuple[str, ...]:
    return tuple(name for name, declared in SETTINGS.items() if note in declared.notes)
