"""Save the state of an environment as plain data and restore it, without pickle.

`save` reads the attributes of an environment, of its wrappers and of its helper objects. The result consists of None,
bool, int, float, str, lists, dicts with str keys, and NumPy arrays, so a checkpoint can store it as JSON and arrays.
A value of another type becomes a dict with a tag: `{"tuple": [...]}`, `{"dict": [[key, value], ...]}` and so on.
`load` writes such a state into another environment that was made the same way. It never creates an object from a name
in the state: helper objects and random generators must exist already, and `load` sets their attributes.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec


class NotPlain(Exception):  # noqa: N818 - never an error: `save` returns None instead
    """A part of the state is not plain data, so the environment cannot be saved exactly."""


class _PlainClass:
    """A class without slots and without a base class written in C; `_is_python_object` compares with it."""


# Types and names of attributes that are set at construction and do not change while the environment runs.
_CONSTANT = (gym.Space, EnvSpec, ModuleType, type, FunctionType, BuiltinFunctionType, MethodType)
_CONSTANT_NAMES = frozenset({"spec", "_cached_spec", "_saved_kwargs", "metadata", "_metadata"})
_PLAIN = (type(None), bool, int, float, str)


def save(environment: object) -> dict[str, Any] | None:
    """Return the state of an environment, or None if a part of it is not plain data, such as an emulator's."""
    try:
        return _save_object(environment, set())
    except NotPlain:
        return None


def load(environment: object, state: dict[str, Any]) -> None:
    """Write a state from `save` into an environment that was made the same way and has been reset.

    Raises:
        ValueError: the state is of another kind of environment.
    """
    try:
        _load_object(environment, state)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the saved state does not fit {type(environment).__name__}: {error}") from error


def _save_object(instance: object, seen: set[int]) -> dict[str, Any]:
    """Return an object's attributes. `seen` holds the ids of visited objects, because references may form cycles."""
    if id(instance) in seen:
        return {"seen": True}
    seen.add(id(instance))
    attributes = {}
    for name, value in vars(instance).items():
        if name not in _CONSTANT_NAMES and not isinstance(value, _CONSTANT):
            attributes[name] = _save_attribute(value, seen)
    return {"class": _class_name(instance), "object": attributes}


def _save_attribute(value: object, seen: set[int]) -> Any:
    """Return an attribute as plain data. Generators, enum members and helper objects are restored in place."""
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
    """Return a value as plain data, or raise `NotPlain`."""
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
    """Return True for booleans, integers and floats of up to 8 bytes in native byte order."""
    return dtype.kind in "biuf" and dtype.itemsize <= 8 and dtype.isnative


def _is_python_object(value: object) -> bool:
    """Return True if `__dict__` holds the whole state: no slots, no fields of a base class written in C."""
    return hasattr(value, "__dict__") and _layout(type(value)) == _layout(_PlainClass)


def _layout(kind: type) -> tuple[int, int, int]:
    return kind.__basicsize__, kind.__dictoffset__, kind.__weakrefoffset__


def _class_name(instance: object) -> str:
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


def _load_object(instance: object, state: dict[str, Any]) -> None:
    """Set the attributes of an existing object."""
    if state["class"] != _class_name(instance):
        raise TypeError(f"the state is of a {state['class']}, the object is a {_class_name(instance)}")
    attributes = vars(instance)
    for name, saved in state["object"].items():
        attributes[name] = _load_attribute(saved, attributes.get(name))


def _load_attribute(saved: Any, current: Any) -> Any:
    """Return the restored attribute. Helper objects and random generators are changed in place."""
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
    """Return the value that `_save_value` saved."""
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
