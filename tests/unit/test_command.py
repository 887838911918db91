"""The `hvdqn` command: its subcommands, shell completion and one-line errors."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hvdqn import __main__, __version__
from hvdqn.__main__ import COMMANDS, COMPLETION_FLAG
from tests.launchers import clean_environment


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hvdqn", *words],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


COMPLETE = """
source "$1"; shift
complete_with=$(complete -p hvdqn | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
COMP_WORDS=(hvdqn "$@"); COMP_CWORD=$#
$complete_with hvdqn "${COMP_WORDS[$#]}" "${COMP_WORDS[$# - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completions(script: Path, *words: str) -> list[str]:
    """Return what bash offers after `hvdqn WORDS`, where the last word is not complete."""
    command = ["bash", "-c", COMPLETE, "bash", str(script), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()


def test_bash_completes_commands_their_flags_and_choices(tmp_path: Path) -> None:
    printed = run(COMPLETION_FLAG, "bash")
    assert (printed.returncode, printed.stderr) == (0, "")
    for command in COMMANDS:
        assert f"'{command}'" in printed.stdout
    assert "--total-env-steps" in printed.stdout
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed: its completion is NOT tested")
    script = tmp_path / "hvdqn"
    script.write_text(printed.stdout)
    assert completions(script, "tr") == ["train"]
    assert completions(script, "train", "--total-e") == ["--total-env-steps"]
    assert completions(script, "train", "--head", "") == ["scalar", "c51", "hl-gauss", "qr", "iqn"]
    assert completions(script, "eval", "--epi") == ["--episodes"]
    assert "scaling" in completions(script, "bench", "")
    assert completions(script, "plot", "--gr") == ["--group"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        ([COMPLETION_FLAG, "ksh"], "no completion for the shell 'ksh'; there are bash, zsh, fish"),
        ([COMPLETION_FLAG], "no completion for the shell ''; there are bash, zsh, fish"),
        (["train", "--learnin-starts", "3"], "unknown argument '--learnin-starts'; did you mean"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert __main__.main(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("hvdqn: error: ")
    assert says in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_names_the_commands_and_imports_none(words: list[str]) -> None:
    code = (
        f"import sys; from hvdqn.__main__ import main; code = main({words}); "
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'hvdqn.train', 'hvdqn.plot')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    for name in COMMANDS:
        assert f"  {name} " in result.stdout
    assert COMPLETION_FLAG in result.stdout


@pytest.mark.parametrize(
    "words", [["--version"], ["train", "--version"], ["eval", "--version"], ["plot", "--version"]]
)
def test_the_version_is_printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As `python -m hvdqn.train --version` does, whatever else is on the command line."""
    code: object
    try:
        code = __main__.main(words)
    except SystemExit as left:
        code = left.code
    assert (code, capsys.readouterr()) == (0, (f"hvdqn {__version__}\n", ""))
