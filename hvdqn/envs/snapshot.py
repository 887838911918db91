"""The state of an environment as plain data: numbers, arrays and the states of random generators. No pickle.

`save` walks the attributes of an environment, its wrappers and its own helper objects. What it returns is made of
None, bool, int, float, str, lists, dicts with str keys, and numpy arrays, so that the arrays can be stored apart
from a JSON text. Everything that JSON cannot say is a dict of one tag: `{"tuple": [...]}`, `{"dict": [[key, value],
...]}` and so on. `load` puts such a state into another environment of the same build. It never creates an object
from a name that it read: helper objects and random generators must be there already, and are filled.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec


class NotPlain(Exception):  # noqa: N818 - an answer, not an error: the caller turns it into None
    """Part of the state is no plain data, so the environment cannot be saved exactly."""


class _Python:
    """Stands for any class written in Python: see `_is_python_object`."""


# What an environment is built with and does not change while it runs.
_CONSTANT = (gym.Space, EnvSpec, ModuleType, type, FunctionType, BuiltinFunctionType, MethodType)
_CONSTANT_NAMES = frozenset({"spec", "_cached_spec", "_saved_kwargs", "metadata", "_metadata"})
_PLAIN = (type(None), bool, int, float, str)


def save(environment: object) -> dict[str, Any] | None:
    """The state of an environment, or None where some of it is no plain data (a physics engine, an emulator)."""
    try:
        return _save_object(environment, set())
    except NotPlain:
        return None


def load(environment: object, state: dict[str, Any]) -> None:
    """Put a state from `save` into an environment of the same build that has been reset.

    Raises:
        ValueError: the state belongs to another kind of environment.
    """
    try:
        _load_object(environment, state)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the saved state does not fit {type(environment).__name__}: {error}") from error


def _save_object(thing: object, seen: set[int]) -> dict[str, Any]:
    """Its attributes; `seen` are the objects met already, for some point back at their owners."""
    if id(thing) in seen:
        return {"seen": True}
    seen.add(id(thing))
    attributes = {}
    for name, value in vars(thing).items():
        if name not in _CONSTANT_NAMES and not isinstance(value, _CONSTANT):
            attributes[name] = _save_attribute(value, seen)
    return {"class": _class_name(thing), "object": attributes}


def _save_attribute(value: object, seen: set[int]) -> Any:
    """Plain data, or what can only be filled in place: generators, enum members, helper objects."""
    if isinstance(value, np.random.Generator):
        return {"generator": _save_value(value.bit_generator.state)}
    if isinstance(value, np.random.RandomState):
        return {"random_state": _save_value(value.get_state(legacy=False))}
    if isinstance(value, Enum):
        return {"enum": value.name}
    if _is_python_object(value):
        return _save_object(value, seen)
    return _save_value(value)


def _save_value(value: object) -> Any:
    if type(value) in _PLAIN:
        return value
    if type(value) is np.ndarray and _is_storable(value.dtype):
        return value.copy()
    if type(value) is np.ndarray and value.dtype.kind in "SU":
        text = np.char.decode(value, "latin-1") if value.dtype.kind == "S" else value
        return {"text": text.ravel().tolist(), "shape": list(value.shape), "dtype": value.dtype.str}
    if isinstance(value, (np.bool_, np.number)) and _is_storable(value.dtype):
        return {"scalar": np.array(value)}
    if type(value) is list:
        return [_save_value(item) for item in value]
    if type(value) is tuple:
        return {"tuple": [_save_value(item) for item in value]}
    if type(value) is deque:
        return {"deque": [_save_value(item) for item in value], "maxlen": value.maxlen}
    if type(value) is dict:
        return {"dict": [[_save_value(key), _save_value(item)] for key, item in value.items()]}
    raise NotPlain(type(value).__name__)


def _is_storable(dtype: np.dtype[Any]) -> bool:
    """Whether a checkpoint has a type for it: no text, no complex or extended numbers, no foreign byte order."""
    return dtype.kind in "biuf" and dtype.itemsize <= 8 and dtype.isnative


def _is_python_object(value: object) -> bool:
    """Whether its whole state is in its `__dict__`: no slots, no base class from C with fields of its own."""
    return hasattr(value, "__dict__") and _layout(type(value)) == _layout(_Python)


def _layout(kind: type) -> tuple[int, int, int]:
    return kind.__basicsize__, kind.__dictoffset__, kind.__weakrefoffset__


def _class_name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _load_object(thing: object, state: dict[str, Any]) -> None:
    if state["class"] != _class_name(thing):
        raise TypeError(f"{state['class']} was saved where a {_class_name(thing)} is")
    attributes = vars(thing)
    for name, saved in state["object"].items():
        attributes[name] = _load_attribute(saved, attributes.get(name))


def _load_attribute(saved: Any, current: Any) -> Any:
    if not isinstance(saved, dict):
        return _load_value(saved)
    if "seen" in saved:
        return current
    if "object" in saved:
        _load_object(current, saved)
        return current
    if "generator" in saved:
        current.bit_generator.state = _load_value(saved["generator"])
        return current
    if "random_state" in saved:
        current.set_state(_load_value(saved["random_state"]))
        return current
    if "enum" in saved:
        return type(current)[saved["enum"]]
    return _load_value(saved)


def _load_value(saved: Any) -> Any:
    if isinstance(saved, np.ndarray):
        return saved.copy()
    if isinstance(saved, list):
        return [_load_value(item) for item in saved]
    if not isinstance(saved, dict):
        return saved
    if "scalar" in saved:
        return saved["scalar"][()]
    if "text" in saved:
        text = np.array(saved["text"], str).reshape(saved["shape"])
        is_bytes = np.dtype(saved["dtype"]).kind == "S"
        return (np.char.encode(text, "latin-1") if is_bytes else text).astype(saved["dtype"])
    if "tuple" in saved:
        return tuple(_load_value(item) for item in saved["tuple"])
    if "deque" in saved:
        return deque((_load_value(item) for item in saved["deque"]), maxlen=saved["maxlen"])
    return {_load_value(key): _load_value(item) for key, item in saved["dict"]}
