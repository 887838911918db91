"""What a field of a settings dataclass declares in its annotation, and how to read it.

    quantiles: Annotated[int, at_least(1), Needs("head", "qr"), FIXED] = 200

says that the setting is a whole number of 1 or more, that it has no effect unless `head` is `qr`, and that a resumed
run must keep it. Range checks, warnings about settings without effect, the rules of a resume and the grouping of
`hvdqn plot` are all derived from these notes.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal

import tyro


@dataclass(frozen=True)
class Range:
    """A range of numbers, from `low` to `high` without those in `excluded`, and the words for it in error messages."""

    words: str
    low: float = -math.inf
    high: float = math.inf
    excluded: tuple[float, ...] = ()

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high and number not in self.excluded


def at_least(low: float) -> Range:
    """Return the range of `low` and above."""
    return Range(f"at least {low}" if low else "0 or more", low=low)


def at_most(high: float) -> Range:
    """Return the range of `high` and below."""
    return Range(f"at most {high}" if high else "0 or less", high=high)


def above(low: float) -> Range:
    """Return the range above `low`, without `low` itself."""
    return Range(f"above {low}", low=low, excluded=(low,))


def between(low: float, high: float, excluded: tuple[float, ...] = ()) -> Range:
    """Return the range from `low` to `high`; an end in `excluded` does not belong to it."""
    left, right = "(" if low in excluded else "[", ")" if high in excluded else "]"
    return Range(f"within {left}{low}, {high}{right}", low, high, excluded)


class Needs:
    """The setting has an effect only if another setting has one of these values."""

    def __init__(self, setting: str, *values: Any) -> None:
        self.setting, self.values = setting, values


class Note(Enum):
    """Further notes. Without one, a setting may change on resume (the run reports it) and splits curves of a plot."""

    FIXED = "a resumed run must keep the value"
    EXACT_ONLY = "a resumed run may change the value, but then it does not continue bit for bit"
    INCIDENTAL = (
        "a resumed run may change the value and does not report it: it only says how the run is started"
    )
    LAUNCH = "the value belongs to one launch: a resumed run does not take it from its config.yaml"
    SAME_CURVE = "`hvdqn plot` draws runs that differ only in this as one curve, like runs of different seeds"
    JSON_TEXT = "the value is the text of a JSON object; a YAML file may hold a mapping instead"
    COMMA_TEXT = "the value is names joined by commas; a YAML file may hold a list instead"


FIXED, EXACT_ONLY, INCIDENTAL = Note.FIXED, Note.EXACT_ONLY, Note.INCIDENTAL
LAUNCH, SAME_CURVE, JSON_TEXT, COMMA_TEXT = Note.LAUNCH, Note.SAME_CURVE, Note.JSON_TEXT, Note.COMMA_TEXT


@dataclass(frozen=True)
class Field:
    """One field of an options dataclass: what a flag or a key of a YAML file may set."""

    name: str
    section: str
    """Field of the outer dataclass that holds the section; "" if the outer dataclass holds the field itself."""
    type: Any
    """The annotation without notes and without None: bool, int, float, str, Path, Literal[...], tuple[..., ...]."""
    default: Any
    """`dataclasses.MISSING` for a required argument."""
    notes: tuple[Any, ...] = ()

    @property
    def flag(self) -> str:
        """The flag, such as `--total-env-steps`."""
        return flag_of(self.name)

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other spellings of the flag, such as `-o`."""
        return tuple(alias for note in self.notes for alias in getattr(note, "aliases", None) or ())

    @property
    def positional(self) -> bool:
        """Whether the value is given without a flag."""
        return tyro.conf.Positional in self.notes

    @property
    def repeatable(self) -> bool:
        """Whether the flag takes one value and may be repeated."""
        return tyro.conf.UseAppendAction in self.notes

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a Literal; empty for all other types."""
        return typing.get_args(self.type) if typing.get_origin(self.type) is Literal else ()

    @property
    def item_type(self) -> Any:
        """The type of one item of a tuple; None for all other types."""
        return typing.get_args(self.type)[0] if typing.get_origin(self.type) is tuple else None

    @property
    def ranges(self) -> list[Range]:
        """The ranges that the number, or every number of a tuple, must lie in."""
        return [note for note in self.notes if isinstance(note, Range)]

    @property
    def needs(self) -> list[Needs]:
        """The `Needs` of this setting: it has an effect only if the settings that they name have certain values."""
        return [note for note in self.notes if isinstance(note, Needs)]


def flag_of(name: str) -> str:
    """Return the flag of a setting: `--total-env-steps` of `total_env_steps`."""
    return "--" + name.replace("_", "-")


# Evaluating annotations takes milliseconds, and each start reads those of the settings several times.
_known_fields: dict[type[Any], Mapping[str, Field]] = {}


def fields_of(kind: type[Any]) -> Mapping[str, Field]:
    """Return the fields of an options dataclass by name, those of nested dataclasses included."""
    if kind not in _known_fields:
        _known_fields[kind] = _read_fields(kind)
    return _known_fields[kind]


def _read_fields(kind: type[Any]) -> Mapping[str, Field]:
    found: dict[str, Field] = {}
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            inner = fields_of(hint).values()
            found |= {f.name: dataclasses.replace(f, section=field.name) for f in inner}
        else:
            bare, notes = _without_notes(hint)
            found[field.name] = Field(field.name, "", bare, field.default, notes)
    return found


def _without_notes(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Split an annotation into its bare type, without None, and the notes of `Annotated`."""
    notes: tuple[Any, ...] = ()
    if typing.get_origin(hint) is Annotated:
        hint, *extras = typing.get_args(hint)
        notes = tuple(extras)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint, notes
