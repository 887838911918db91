"""The search space: settings and the values to try, as `--search lr=1e-5:1e-3:log` gives them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hvdqn.config import Field, flag_of, setting, value_of_words
from hvdqn.errors import UserError

FORMS = "write NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A,B,C"


@dataclass(frozen=True)
class Search:
    """The values of one setting that are tried."""

    name: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    """Only whole numbers of the range."""
    choices: tuple[str, ...] = ()
    """Instead of a range: values as on a command line, with spaces between those of a list."""


def read_space(texts: Sequence[str]) -> list[Search]:
    """Return the search space that `--search` flags describe.

    Raises:
        UserError: one is malformed, or names an unknown setting or a value that the setting cannot have.
    """
    if not texts:
        raise UserError(f"nothing to search; give --search once or more often: {FORMS}")
    space = [read_search(text) for text in texts]
    names = [search.name for search in space]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--search names {twice[0]} twice; give it once")
    return space


def read_search(text: str) -> Search:
    """Return the values that one `--search` flag describes.

    Raises:
        UserError: it is malformed, or names an unknown setting or a value that the setting cannot have.
    """
    name, equals, values = text.partition("=")
    if not equals or not values:
        raise UserError(f"--search {text!r}: {FORMS}")
    field = setting(name.strip().lstrip("-").replace("-", "_"))
    if field.name in ("run_dir", "resume", "config"):
        raise UserError(f"--search cannot change {field.flag}, which each trial has of its own")
    if ":" not in values or field.type is str:
        choices = tuple(" ".join(choice.split()) for choice in values.split(","))
        for choice in choices:
            words_of(field, choice)
        return Search(field.name, choices=choices)
    if field.type not in (int, float):
        raise UserError(f"--search {text!r}: {field.flag} takes no range; {FORMS}")
    low, high, *scale = values.split(":")
    if scale not in ([], ["log"]):
        raise UserError(f"--search {text!r}: {FORMS}")
    ends = [float(check_value(field, value_of_words(field, [end]))) for end in (low, high)]
    if ends[0] >= ends[1] or (scale and ends[0] <= 0):
        raise UserError(
            f"--search {text!r}: LOW must be below HIGH{', and above 0 on a log scale' if scale else ''}"
        )
    return Search(field.name, ends[0], ends[1], log=bool(scale), whole=field.type is int)


def check_value(field: Field, value: Any) -> Any:
    """Return the value if it lies in the setting's range.

    Raises:
        UserError: it does not.
    """
    for allowed in field.ranges:
        for number in value if isinstance(value, tuple) else (value,):
            if number not in allowed or not math.isfinite(number):
                raise UserError(f"--search {field.name}={number}: it must be {allowed.words}")
    return value


def words_of(field: Field, text: str) -> list[str]:
    """Return the words of a command line that give the setting a value.

    Raises:
        UserError: the setting has no such value.
    """
    if field.type is bool:
        if text not in ("true", "false"):
            raise UserError(f"--search {field.name}={text}: write true or false")
        return [field.flag if text == "true" else f"--no-{field.flag[2:]}"]
    words = text.split(" ") if field.item_type else [text]
    check_value(field, value_of_words(field, words))
    return [flag_of(field.name), *words]
