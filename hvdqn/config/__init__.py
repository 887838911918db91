"""Settings of a run: declared once in `settings.py`, read from flags and YAML, checked. Nothing here imports torch.

settings.py    all settings: default, range, dependencies, help
fields.py      the notes that a setting carries, and how to read them
presets.py     tuned values
parsing.py     command line -> Config; flags.py and values.py read flags and single values
validation.py  checks of ranges and of settings that contradict each other
"""

from __future__ import annotations

from hvdqn.config.algorithms import ALGORITHMS, JOINED
from hvdqn.config.fields import Field, flag_of
from hvdqn.config.flags import parse_flags, print_completion, print_text
from hvdqn.config.joining import fitting_preset, preset_names
from hvdqn.config.names import did_you_mean, import_attribute, import_module
from hvdqn.config.parsing import CONFIG_FILE, as_yaml, parse, read_config_file
from hvdqn.config.presets import PRESETS
from hvdqn.config.settings import (
    Config,
    EnvironmentConfig,
    ExplorationConfig,
    LearningConfig,
    NetworkConfig,
    ParallelConfig,
    ReplayConfig,
    RunConfig,
    incidental_settings,
    preset_config,
    same_setting,
    setting,
    settings_fixed_on_resume,
    settings_of_exact_resume,
    settings_of_same_curve,
)
from hvdqn.config.validation import (
    check,
    check_engine,
    check_groups,
    check_saved,
    check_world,
    unused_settings,
)
from hvdqn.config.values import json_object, value_of_data, value_of_words

__all__ = [
    "ALGORITHMS",
    "CONFIG_FILE",
    "JOINED",
    "PRESETS",
    "Config",
    "EnvironmentConfig",
    "ExplorationConfig",
    "Field",
    "LearningConfig",
    "NetworkConfig",
    "ParallelConfig",
    "ReplayConfig",
    "RunConfig",
    "as_yaml",
    "check",
    "check_engine",
    "check_groups",
    "check_saved",
    "check_world",
    "did_you_mean",
    "fitting_preset",
    "flag_of",
    "import_attribute",
    "import_module",
    "incidental_settings",
    "json_object",
    "parse",
    "parse_flags",
    "preset_config",
    "preset_names",
    "print_completion",
    "print_text",
    "read_config_file",
    "same_setting",
    "setting",
    "settings_fixed_on_resume",
    "settings_of_exact_resume",
    "settings_of_same_curve",
    "unused_settings",
    "value_of_data",
    "value_of_words",
]
