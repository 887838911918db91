"""The commands of README.md and docs/*.md, for the tests that run them. Tests copy a command from its page.

    line = command("mpirun -np 2 python -m hvdqn.train --preset cartpole", {"--preset cartpole": "--preset smoke"})

A command is a line of a ```bash block without its comment, or inline code that begins with a program and has an
argument other than flags. A test may replace parts of a command, to make it shorter or to fill in a name.
tests/launch/test_readme.py checks that there is a test for each command.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path

from tests.launchers import REPOSITORY

# Inline code that begins with one of these words and has an argument is a command.
PROGRAMS = (
    *("python", "pip", "hvdqn", "horovodrun", "mpirun", "torchrun", "srun", "sbatch", "scancel", "squeue", "sacct"),
    *("apt", "module", "source", "git", "ssh", "export", "docker", "apptainer", "bash", "sh", "nvidia-smi"),
)  # fmt: skip
_COMMAND = re.compile(rf"(\w+=\S+ )*((\./)?(launch|slurm)/\w+\.\w+|({'|'.join(PROGRAMS)}))(?= ).* [^- ]")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """Return README.md and every page of docs/."""
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def without_blocks(page: Path) -> str:
    """Return the text of a page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


@functools.cache
def commands() -> tuple[str, ...]:
    """Return every command of every page once, in order, with single spaces between words."""
    return tuple(dict.fromkeys(line for page in pages() for line in _commands_of(page)))


def _commands_of(page: Path) -> list[str]:
    blocks = _FENCE.findall(page.read_text(encoding="utf-8"))
    found = [line for language, block in blocks if language == "bash" for line in _lines(block)]
    inline = (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", without_blocks(page)))
    return found + [code for code in inline if _COMMAND.match(code)]


def _lines(block: str) -> list[str]:
    joined = block.replace("\\\n", " ")
    lines = (" ".join(re.sub(r"(^|\s)#.*", "", line).split()) for line in joined.splitlines())
    return [line for line in lines if line]


def command(text: str, replaced: Mapping[str, str] | None = None) -> str:
    """Return the command `text` with some parts replaced; fail if no page has it, or if it lacks a part."""
    assert text in commands(), f"neither README.md nor docs/ has the command {text!r}"
    for part, other in (replaced or {}).items():
        assert part in text, f"no {part!r} in {text!r}"
        text = text.replace(part, other)
    return text
