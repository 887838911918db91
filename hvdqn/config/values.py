"""Read the value of a setting from the words of a command line or the data of a YAML file."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Sequence
from typing import Any

from hvdqn.config.fields import COMMA_TEXT, JSON_TEXT, Field
from hvdqn.errors import UserError


def value_of_words(field: Field, words: Sequence[str]) -> Any:
    """Convert the words after a flag to the value of the setting.

    Raises:
        UserError: there is no such value.
    """
    if field.item_type is not None:
        return tuple(_read(field, word, field.item_type) for word in words)
    return _read(field, words[0], field.type)


def value_of_data(field: Field, data: Any) -> Any:
    """Convert an entry of a YAML file to the value of the setting.

    Raises:
        UserError: the entry has another type than the setting.
    """
    if field.item_type is not None:
        items = data if isinstance(data, list) else [data]
        return tuple(_read(field, item, field.item_type) for item in items)
    if isinstance(data, list) and COMMA_TEXT in field.notes:
        return ",".join(_read(field, item, field.type) for item in data)
    if isinstance(data, dict) and JSON_TEXT in field.notes:
        try:
            return json.dumps(data)
        except TypeError as error:  # such as a date, which YAML reads without quotes
            raise UserError(f"{field.name} holds what JSON cannot: {error}; put it in quotes") from None
    return _read(field, data, field.type)


def _read(field: Field, data: Any, kind: Any) -> Any:
    """Convert one word, or one scalar of a YAML file, to a bool, int, float, choice or text."""
    if kind is bool:
        if isinstance(data, bool):
            return data
        raise UserError(f"{field.name} is {data!r}; it must be true or false")
    if kind is int:
        return _whole_number(field, data)
    if kind is float:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            if not isinstance(data, bool):
                return float(data)
        raise UserError(f"{field.flag} is {data!r}; it must be a number")
    if field.choices:
        # YAML reads the words yes and no as booleans; they are choices of --checkpoint-replay.
        word = {True: "yes", False: "no"}[data] if isinstance(data, bool) else str(data)
        if word not in field.choices:
            raise UserError(f"{field.flag} is {word!r}; it must be one of {', '.join(field.choices)}")
        return word
    if isinstance(data, bool) or not isinstance(data, (str, int, float, datetime.date)):
        raise UserError(f"{field.name} is {data!r}; it must be text, in quotes if need be")
    return kind(str(data))


def json_object(flag: str, text: str) -> dict[str, Any]:
    """Return the JSON object in the value of a flag.

    Raises:
        UserError: it is no JSON object.
    """
    try:
        data = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise UserError(f'{flag} {text!r} is not JSON ({error.msg}); write {{"name": value}}') from None
    if not isinstance(data, dict):
        raise UserError(f'{flag} {text!r} is not a JSON object; write {{"name": value}}')
    return data


def same_value(field: Field, one: Any, other: Any) -> bool:
    """Return True if two values of a setting mean the same. JSON is compared by its content, not by its text."""
    if JSON_TEXT in field.notes:
        with contextlib.suppress(ValueError, TypeError):
            return bool(json.loads(one or "{}") == json.loads(other or "{}"))
    return bool(one == other)


def _whole_number(field: Field, data: Any) -> int:
    """Read a whole number as people write large ones: 1000000, 1_000_000, 1e6, 1.0e+6 and 1000000.0."""
    if isinstance(data, (str, int, float)) and not isinstance(data, bool):
        with contextlib.suppress(ValueError):
            return int(data) if not isinstance(data, float) else _exactly(data)
        with contextlib.suppress(ValueError):
            return _exactly(float(data))
    remedy = (
        f"write them with blanks between, as {data.replace(',', ' ')}"
        if isinstance(data, str) and "," in data
        else "write it as 1000000, 1_000_000 or 1e6"
    )
    raise UserError(f"{field.flag}: {data!r} is no whole number; {remedy}")


def _exactly(number: float) -> int:
    """Return the whole number that a float equals.

    Raises:
        ValueError: it equals none.
    """
    if not number.is_integer():
        raise ValueError(number)
    return int(number)
