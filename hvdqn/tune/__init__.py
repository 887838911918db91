"""`hvdqn tune`: search for good settings, with any number of processes at once.

`space` reads the search space, `study` keeps the trials of all processes in a journal file, `trial` runs one training,
and `command` is the command line. Only `study` and `trial` import Optuna. Nothing here imports torch.
"""

from __future__ import annotations

from hvdqn.tune.command import TuneOptions, main

__all__ = ["TuneOptions", "main"]
