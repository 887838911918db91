"""Metrics of a run: where the time goes, `metrics.jsonl`, TensorBoard events, and progress on the console.

Importing this package does not import torch.
"""

from hvdqn.metrics.console import LineConsole, ProgressLine
from hvdqn.metrics.metrics import Metrics
from hvdqn.metrics.status import Status, number
from hvdqn.metrics.timing import PHASES, Phase, PhaseTimer, WaitHint
from hvdqn.metrics.tracking import check_tracker, open_tracker
from hvdqn.metrics.writers import (
    METRICS_FILE,
    SUMMARY_FILE,
    JsonLines,
    Record,
    TensorBoard,
    Writer,
    finite,
    read_metrics,
    replace_file,
    write_summary,
)

__all__ = [
    "METRICS_FILE",
    "PHASES",
    "SUMMARY_FILE",
    "JsonLines",
    "LineConsole",
    "Metrics",
    "Phase",
    "PhaseTimer",
    "ProgressLine",
    "Record",
    "Status",
    "TensorBoard",
    "WaitHint",
    "Writer",
    "check_tracker",
    "finite",
    "number",
    "open_tracker",
    "read_metrics",
    "replace_file",
    "write_summary",
]
