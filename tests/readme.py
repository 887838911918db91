"""The commands of README.md, for the tests that run them: copied from it, so that the two cannot part.

    line = command("mpirun -np 2 python -m hvdqn.train --preset cartpole", {"--preset cartpole": "--preset smoke"})

A command is a line of a ```bash block, less its comment, and inline code that begins with a program and has an
argument other than flags. What a test replaces, to make it shorter or to fill in a name, stands in that test.
tests/launch/test_readme.py sees to it that there is a test for each.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

from tests.launchers import REPOSITORY

# What inline code begins with where it is a command; the same words alone are a name.
PROGRAMS = (
    *("python", "pip", "hvdqn", "horovodrun", "mpirun", "torchrun", "srun", "sbatch", "scancel", "squeue", "sacct"),
    *("apt", "module", "source", "git", "ssh", "export", "docker", "apptainer", "bash", "sh", "nvidia-smi"),
)  # fmt: skip
_COMMAND = re.compile(rf"(\w+=\S+ )*((\./)?(launch|slurm)/\w+\.\w+|({'|'.join(PROGRAMS)}))(?= ).* [^- ]")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text() -> str:
    """README.md as it is."""
    return (REPOSITORY / "README.md").read_text(encoding="utf-8")


@functools.cache
def commands() -> tuple[str, ...]:
    """Every command in README.md, in its order, with single spaces between words."""
    found = [
        line for language, block in _FENCE.findall(text()) if language == "bash" for line in _lines(block)
    ]
    prose = _FENCE.sub("", text())
    inline = (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose))
    found += [code for code in inline if _COMMAND.match(code)]
    return tuple(dict.fromkeys(found))


def _lines(block: str) -> list[str]:
    joined = block.replace("\\\n", " ")
    lines = (" ".join(re.sub(r"(^|\s)#.*", "", line).split()) for line in joined.splitlines())
    return [line for line in lines if line]


def command(text: str, replaced: Mapping[str, str] | None = None) -> str:
    """The command that is `text`, with some of its parts replaced; fails if README does not say so, or lacks a part."""
    assert text in commands(), f"README.md has no command {text!r}"
    for part, other in (replaced or {}).items():
        assert part in text, f"no {part!r} in {text!r}"
        text = text.replace(part, other)
    return text
