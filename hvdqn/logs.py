"""Set up logging: which messages each rank shows, and where.

Every module logs to its own logger, `log = logging.getLogger(__name__)`. An entry point calls `setup_logging` once it
knows its rank. Rank 0 then shows INFO and above, the other ranks show ERROR and above. The environment variable
HVDQN_LOG_LEVEL changes the level; with DEBUG every rank shows everything. Code that imports hvdqn without calling
`setup_logging` keeps the logging configuration of its own.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Protocol, TextIO

from hvdqn.errors import UserError

LEVEL_VARIABLE = "HVDQN_LOG_LEVEL"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
# `python -m hvdqn.train` runs that module under the name `__main__`.
LOGGERS = ("hvdqn", "__main__")


class Display(Protocol):
    """The interface of a progress display that can print lines above itself."""

    def print_line(self, text: str) -> None:
        """Print one line above the display."""


class OutputHandler(logging.Handler):
    """Write messages below ERROR to standard output, or through the progress display while one is open."""

    display: Display | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message. A closed terminal or a full disk does not end the run."""
        if record.levelno >= logging.ERROR:
            return
        try:
            text = self.format(record)
            if self.display is not None:
                self.display.print_line(text)
            else:
                print(encodable(text, sys.stdout), flush=True)
        except OSError:
            pass
        except Exception:
            self.handleError(record)


class ErrorHandler(logging.Handler):
    """Write messages of level ERROR and above to standard error.

    Separate from `OutputHandler`, whose lock may be held by a thread that is stuck in writing to standard output.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        if record.levelno < logging.ERROR:
            return
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except OSError:
            pass
        except Exception:
            self.handleError(record)


class RankFormatter(logging.Formatter):
    """Format messages as `text`, `warning: text` and `hvdqn: error: text`; errors name their rank if it is not 0.

    Args:
        rank: of this process.
        size: number of ranks; 0 if it is not known yet.
        debug: put the rank and the logger's name before every message that is not an error.
    """

    def __init__(self, rank: int, size: int, debug: bool) -> None:
        super().__init__()
        self.rank, self.size, self.debug = rank, size, debug

    def format(self, record: logging.LogRecord) -> str:
        """Return the text to print, with the traceback if the record has one."""
        text = super().format(record)
        if record.levelno >= logging.ERROR:
            named = self.rank == 0 or text.startswith(f"rank {self.rank} ")
            return f"hvdqn: error: {text}" if named else f"hvdqn: error: rank {self.rank}: {text}"
        if record.levelno >= logging.WARNING:
            text = f"warning: {text}"
        if self.debug:
            rank = "" if self.size == 1 else f"rank {self.rank} "
            text = f"[{rank}{record.name}] {text}"
        return text


_output_handler = OutputHandler()
_error_handler = ErrorHandler()


def setup_logging(rank: int, size: int) -> None:
    """Make this process show its log messages as its rank should. Call it again when the rank changes.

    Args:
        rank: of this process.
        size: number of ranks; 0 if it is not known yet.

    Raises:
        UserError: HVDQN_LOG_LEVEL is not a level. Logging is then set up with the default level.
    """
    replace_closed_streams()
    wanted = os.environ.get(LEVEL_VARIABLE) or "INFO"
    name = wanted.upper() if wanted.upper() in LEVELS else "INFO"
    debug = name == "DEBUG"
    level = logging.getLevelName(name)
    formatter = RankFormatter(rank, size, debug)
    for handler in (_output_handler, _error_handler):
        handler.setFormatter(formatter)
        for logger in map(logging.getLogger, LOGGERS):
            logger.addHandler(handler)
            logger.setLevel(level if rank == 0 or debug else max(level, logging.ERROR))
            logger.propagate = (
                False  # a handler that a library adds to the root logger would print a second time
            )
    if wanted.upper() not in LEVELS:
        raise UserError(f"{LEVEL_VARIABLE} is '{wanted}'; set it to one of {', '.join(LEVELS)}")


def replace_closed_streams() -> None:
    """Open the null device for each standard stream that is closed, as after `>&-`.

    Python sets such a stream to None. Without this, the next file that is opened, perhaps a file of the run, would get
    the stream's descriptor, and libraries would print into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115


def open_display(display: Display) -> None:
    """Print messages below ERROR through this progress display from now on."""
    _output_handler.display = display


def close_display(display: Display) -> None:
    """Print messages to standard output again, unless another display was opened since."""
    if _output_handler.display is display:
        _output_handler.display = None


def encodable(text: str, stream: TextIO) -> str:
    """Return the text with escapes for characters that the stream cannot encode, as under LC_ALL=C."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
