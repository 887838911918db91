"""Command lines: read the flags of a dataclass, print its help and write a completion script.

Flags are read here and converted by the same code as a YAML file, so that every mistake is one line with the remedy.
tyro prints the help and the completion script from the same dataclass.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import itertools
import os
import shutil
import sys
import textwrap
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NoReturn, TypeVar

import tyro
from tyro import MISSING_NONPROP

from hvdqn import __version__
from hvdqn.config.fields import Field, fields_of, flag_of
from hvdqn.config.names import OTHER_NAMES, did_you_mean
from hvdqn.config.values import value_of_words
from hvdqn.errors import UserError

T = TypeVar("T")

HELP_FLAGS = ("-h", "--help")
VERSION_FLAG = "--version"
PRINT_CONFIG_FLAG = "--print-config"
SHELLS = ("bash", "zsh", "fish")
OTHER_FLAGS = {flag_of(other): flag_of(name) for other, name in OTHER_NAMES.items()}


def parse_flags(kind: type[T], argv: Sequence[str], prog: str) -> T:
    """Return an instance of a dataclass with the values of a command line.

    Raises:
        UserError: an argument is unknown or missing, or has a wrong value.
        SystemExit: 0 after `--help` or `--version`.
    """
    if VERSION_FLAG in argv:
        print_version()
    if any(word in HELP_FLAGS for word in argv):
        print_help(kind, prog)
    given = read_flags(kind, argv)
    for field in fields_of(kind).values():
        if field.default is dataclasses.MISSING and field.name not in given:
            if field.item_type is None:
                raise UserError(f"{field.name.upper()} is missing; see {prog} --help")
            given[field.name] = ()
    return kind(**given)


def read_flags(kind: type[Any], argv: Sequence[str]) -> dict[str, Any]:
    """Return the values that a command line gives, by field name. If a flag is repeated, the last one counts.

    Raises:
        UserError: an argument is unknown or has a wrong value.
    """
    flags = _flags(kind)
    positional = [field for field in fields_of(kind).values() if field.positional]
    given: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, attached = _split(word, flags)
        if flag in flags:
            field = flags[flag]
            if field.type is bool:
                _refuse_value_of_switch(field, attached, words)
                given[field.name] = not flag.startswith("--no-")
                continue
            value = value_of_words(field, _take_values(field, attached, words))
        elif positional and not _looks_like_flag(word):
            field = positional[0] if positional[0].item_type else positional.pop(0)
            value = value_of_words(field, [word])
        else:
            near = did_you_mean(flag, flags, OTHER_FLAGS)
            raise UserError(f"unknown argument '{flag}'{near}; see --help for all flags")
        collects = field.repeatable or (field.positional and field.item_type)
        given[field.name] = (*given.get(field.name, ()), *value) if collects else value
    return given


def _flags(kind: type[Any]) -> Mapping[str, Field]:
    """Return the field of every flag: `--lr`, `-o`, and both `--double` and `--no-double`."""
    flags: dict[str, Field] = {}
    for field in fields_of(kind).values():
        if not field.positional:
            negation = [f"--no-{field.flag[2:]}"] if field.type is bool else []
            flags |= dict.fromkeys([field.flag, *field.aliases, *negation], field)
    return flags


def _split(word: str, flags: Mapping[str, Field]) -> tuple[str, str | None]:
    """Split `--lr=0.1` and `-oFILE` into the flag and its value. Underscores in long flags count as hyphens."""
    flag, equals, value = word.partition("=")
    if flag.startswith("--"):
        flag = flag.replace("_", "-")
    elif flag not in flags and word[:2] in flags:
        return word[:2], word[2:]
    return flag, value if equals else None


def _take_values(field: Field, attached: str | None, words: list[str]) -> list[str]:
    """Remove the values of a flag from the words after it and return them.

    Raises:
        UserError: there is none.
    """
    taken = [] if attached is None else [attached]
    takes_many = field.item_type is not None and not field.repeatable
    while words and (takes_many or not taken) and not _looks_like_flag(words[0]):
        taken.append(words.pop(0))
    if not taken and not takes_many:
        example = "" if field.default in (None, "", (), dataclasses.MISSING) else f", such as {field.default}"
        raise UserError(f"{field.flag} needs a value{example}; see --help")
    return taken


def _looks_like_flag(word: str) -> bool:
    """Return True for `--lr` and `-o`, but not for negative numbers such as `-1` or `-inf`."""
    if word.lower() in ("-inf", "-infinity", "-nan"):
        return False
    return word.startswith("-") and word.lstrip("-")[:1].isalpha()


def _refuse_value_of_switch(field: Field, attached: str | None, words: Sequence[str]) -> None:
    """Refuse `--double false` and `--double=false`.

    Raises:
        UserError: a switch has a value.
    """
    next_word = words[0].lower() if words else ""
    if attached is not None or next_word in ("true", "false", "yes", "no", "on", "off", "0", "1"):
        raise UserError(f"{field.flag} takes no value; write {field.flag} or --no-{field.flag[2:]}")


def print_version() -> NoReturn:
    """Print the version of this package and exit.

    Raises:
        SystemExit: 0.
    """
    print_text(f"hvdqn {__version__}")
    raise SystemExit(0)


def print_help(kind: type[T], prog: str, default: T | None = None) -> NoReturn:
    """Print the help of all flags, with the values of `default`, and exit.

    Raises:
        SystemExit: 0.
    """
    text = _output_of_tyro(kind, prog, ["--help"], MISSING_NONPROP if default is None else default)
    columns = shutil.get_terminal_size().columns
    # tyro does not wrap the description of the command.
    lines = (line.rstrip() for line in text.splitlines())
    print_text("\n".join(textwrap.fill(line, columns) if len(line) > columns else line for line in lines))
    raise SystemExit(0)


def print_completion(commands: Any, shell: str, prog: str) -> None:
    """Print the script that completes a command line in a shell.

    Args:
        commands: a union of dataclasses, each annotated as a subcommand.
        shell: one of `SHELLS`.
        prog: name of the program.

    Raises:
        UserError: there is no completion for this shell.
    """
    if shell not in SHELLS:
        raise UserError(f"there is no completion for the shell '{shell}'; there are {', '.join(SHELLS)}")
    script = _output_of_tyro(commands, prog, ["--tyro-print-completion", shell], MISSING_NONPROP)
    # tyro does not escape the line breaks of help texts: the shell would offer every line as a completion.
    lines = [
        line.replace("\\n", " ") if line.startswith("COMPLETION_SPEC = ") else line
        for line in script.splitlines()
    ]
    print_text("\n".join(lines))


def _output_of_tyro(kind: Any, prog: str, argv: Sequence[str], default: Any) -> str:
    """Return the text that tyro prints for flags such as `--help`."""
    _join_help_texts(kind)
    out = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(out):
        tyro.cli(kind, prog=prog, args=argv, default=default, config=(tyro.conf.OmitArgPrefixes,))
    return out.getvalue()


def _join_help_texts(kind: Any) -> None:
    """Add the help text of each field of a dataclass, or of a union of them, to its annotation, as one line.

    tyro itself keeps the line breaks of these texts in the source.
    """
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
        for part in typing.get_args(kind):
            _join_help_texts(part)
        return
    hints = typing.get_type_hints(kind, include_extras=True)
    definition = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(definition, ast.ClassDef)
    for field, text in itertools.pairwise(definition.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(words))):
                kind.__annotations__[name] = Annotated[
                    hints[name], tyro.conf.arg(help=" ".join(words.split()))
                ]
    for hint in hints.values():
        _join_help_texts(hint)


def print_text(text: str) -> None:
    """Print text, also into a pipe that closes early (`--help | head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # Python flushes once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
