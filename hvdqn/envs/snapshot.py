"""Save the state of an environment as plain data and restore it, without pickle.

`save` reads the attributes of an environment, of its wrappers and of its helper objects. The result consists of None,
bool, int, float, str, lists, dicts with str keys, and NumPy arrays, so a checkpoint can store it as JSON and arrays.
A value of another type becomes a dict with a tag: `{"tuple": [...]}`, `{"keys": [...], "values": [...]}` and so on.
Many numbers of one type become an array: `{"list": array}`.
`load` writes such a state into another environment that was made the same way. It never creates an object from a name
in the state: helper objects and random generators must exist already, and `load` sets their attributes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray


class NotPlain(Exception):  # noqa: N818 - never an error: `save` returns None instead
    """Raised for a part of the state that is not plain data (numbers, text, arrays, containers) and cannot be saved."""


class _PlainClass:
    """A class without slots and without a base class written in C; `_is_python_object` compares with it."""


# Attributes of these types or names are not saved: the constructor sets them, and they do not change afterwards.
_CONSTANT = (gym.Space, EnvSpec, ModuleType, type, FunctionType, BuiltinFunctionType, MethodType)
_CONSTANT_NAMES = frozenset({"spec", "_cached_spec", "_saved_kwargs", "metadata", "_metadata"})
_PLAIN = (type(None), bool, int, float, str)
_CONTAINERS = (list, tuple, deque, dict)
_PACKED = {bool: np.bool_, int: np.int64, float: np.float64}
_SHORTEST_PACKED = 32
# A deeper or larger state is not saved: JSON is read and written recursively, and a checkpoint limits its size.
_MAX_DEPTH = 64
_MAX_VALUES = 1_000_000
# Python does not read longer integers from text.
_MAX_INTEGER_BITS = 10_000
# `share_arrays` does not compare smaller arrays between environments: storing each of them costs little.
_SMALLEST_SHARED_BYTES = 4096


def save(environment: object) -> dict[str, Any] | None:
    """Return the state of an environment, or None if a part of it is not plain data, such as an emulator's.

    State that contains itself, or that is nested deeper than 64 levels, is not plain data either.
    """
    try:
        return _Saver().save_object(environment)
    except Exception:  # NotPlain, or what a property of the environment raises when it is read
        return None


def load(environment: object, state: dict[str, Any]) -> None:
    """Write a state from `save` into an environment that was made the same way and has been reset.

    Raises:
        ValueError: the state does not fit this environment, for example because it is of another class.
    """
    try:
        _load_object(environment, state)
    except Exception as error:  # any type: the environment's own attributes may raise it
        raise ValueError(f"the saved state does not fit {type(environment).__name__}: {error}") from error


class _Saver:
    """Saves one environment. It visits each helper object once, because references may form cycles."""

    def __init__(self) -> None:
        self.seen: set[int] = set()  # ids of the objects that were visited
        self.open: set[int] = set()  # ids of the containers that are being saved
        self.values = 0

    def save_object(self, instance: object, depth: int = 0) -> dict[str, Any]:
        """Return an object's attributes as plain data, with its class name; `{"seen": True}` if it was saved before."""
        if id(instance) in self.seen:
            return {"seen": True}
        _check_depth(depth)
        self.seen.add(id(instance))
        attributes = {}
        for name, value in vars(instance).items():
            if name not in _CONSTANT_NAMES and not isinstance(value, _CONSTANT):
                attributes[name] = self.save_attribute(value, depth + 1)
        return {"class": _class_name(instance), "object": attributes}

    def save_attribute(self, value: object, depth: int) -> Any:
        """Return an attribute as plain data. Of generators, enum members and helper objects it saves the state only."""
        if isinstance(value, np.random.Generator):
            return {"generator": self.save_value(value.bit_generator.state, depth)}
        if isinstance(value, np.random.RandomState):
            return {"random_state": self.save_value(value.get_state(legacy=False), depth)}
        if isinstance(value, Enum):
            return {"enum": value.name}
        if _is_python_object(value):
            return self.save_object(value, depth)
        return self.save_value(value, depth)

    def save_value(self, value: object, depth: int) -> Any:
        """Return a number, text, array or container as plain data; raise NotPlain for anything else."""
        self.values += 1
        if self.values > _MAX_VALUES or (type(value) is int and value.bit_length() > _MAX_INTEGER_BITS):
            raise NotPlain("the state is too large")
        if type(value) in _PLAIN:
            return value
        if type(value) is np.ndarray and _is_storable(value.dtype):
            return value.copy()
        if type(value) is np.ndarray and value.dtype.kind in "SU":
            text = np.char.decode(value, "latin-1") if value.dtype.kind == "S" else value
            return {"text": text.ravel().tolist(), "shape": list(value.shape), "dtype": value.dtype.str}
        if isinstance(value, (np.bool_, np.number)) and _is_storable(value.dtype):
            return {"scalar": np.array(value)}
        if type(value) in (np.str_, np.bytes_):
            return {"scalar": self.save_value(np.array(value), depth)}
        if type(value) in _CONTAINERS:
            return self.save_container(value, depth)
        raise NotPlain(type(value).__name__)

    def save_container(self, value: Any, depth: int) -> Any:
        """Return a list, tuple, deque or dict as plain data."""
        _check_depth(depth)
        if id(value) in self.open:
            raise NotPlain("a container that contains itself")
        self.open.add(id(value))
        saved: Any
        if type(value) is dict:
            keys, values = list(value.keys()), list(value.values())
            saved = {"keys": self.save_items(keys, depth), "values": self.save_items(values, depth)}
        elif type(value) is list:
            saved = self.save_items(value, depth)
        elif type(value) is tuple:
            saved = {"tuple": self.save_items(value, depth)}
        else:
            saved = {"deque": self.save_items(list(value), depth), "maxlen": value.maxlen}
        self.open.remove(id(value))
        return saved

    def save_items(self, items: Sequence[Any], depth: int) -> Any:
        """Return items as a list, or as one array if they are many numbers of the same type."""
        packed = _packed(items)
        return [self.save_value(item, depth + 1) for item in items] if packed is None else packed


def _check_depth(depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise NotPlain("the state is nested too deeply")


def _packed(items: Sequence[Any]) -> dict[str, Any] | None:
    """Return a long list of numbers of one type as a dict that holds an array; None for every other list.

    As JSON text such a list would take several times as much space.
    """
    if len(items) < _SHORTEST_PACKED or len(kinds := set(map(type, items))) > 1:
        return None
    (kind,) = kinds
    if kind in _PACKED:
        array: NDArray[Any] = np.array(items)
        return {"list": array} if array.dtype == _PACKED[kind] else None  # larger integers have another dtype
    if issubclass(kind, (np.bool_, np.number)) and _is_storable(items[0].dtype):
        return {"scalars": np.array(items)}
    return None


def _is_storable(dtype: np.dtype[Any]) -> bool:
    """Return True for booleans, integers and floats of up to 8 bytes in native byte order."""
    return dtype.kind in "biuf" and dtype.itemsize <= 8 and dtype.isnative


def _is_python_object(value: object) -> bool:
    """Return True if an object's `__dict__` holds its whole state: it has no slots and no base class written in C."""
    return hasattr(value, "__dict__") and _layout(type(value)) == _layout(_PlainClass)


def _layout(kind: type) -> tuple[int, int, int]:
    return kind.__basicsize__, kind.__dictoffset__, kind.__weakrefoffset__


def _class_name(instance: object) -> str:
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


def _load_object(instance: object, state: dict[str, Any]) -> None:
    """Set the attributes of an existing object to those that `_Saver.save_object` saved."""
    if state["class"] != _class_name(instance):
        raise TypeError(f"the state is of a {state['class']}, the object is a {_class_name(instance)}")
    attributes = vars(instance)
    for name, saved in state["object"].items():
        attributes[name] = _load_attribute(saved, attributes.get(name))


def _load_attribute(saved: Any, current: Any) -> Any:
    """Return the new value of an attribute; helper objects and random generators are changed in place.

    Args:
        saved: what `_Saver.save_attribute` returned.
        current: the attribute's value now.
    """
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
    """Return the value for which `_Saver.save_value` returned `saved`."""
    if isinstance(saved, np.ndarray):
        return saved.copy()
    if isinstance(saved, list):
        return [_load_value(item) for item in saved]
    if not isinstance(saved, dict):
        return saved
    if "tuple" in saved:
        return tuple(_load_value(saved["tuple"]))
    if "deque" in saved:
        return deque(_load_value(saved["deque"]), maxlen=saved["maxlen"])
    if "keys" in saved:
        return dict(zip(_load_value(saved["keys"]), _load_value(saved["values"]), strict=True))
    if "dict" in saved:  # written by hvdqn 0.1
        return {_load_value(key): _load_value(item) for key, item in saved["dict"]}
    return _load_numbers(saved)


def _load_numbers(saved: dict[str, Any]) -> Any:
    """Return the NumPy text, NumPy scalar or list of numbers that the dict `saved` describes."""
    if "list" in saved:
        return saved["list"].tolist()
    if "scalars" in saved:
        return list(saved["scalars"])
    if "scalar" in saved:
        return _load_value(saved["scalar"])[()]
    text = np.array(saved["text"], str).reshape(saved["shape"])
    is_bytes = np.dtype(saved["dtype"]).kind == "S"
    return (np.char.encode(text, "latin-1") if is_bytes else text).astype(saved["dtype"])


def share_arrays(states: Sequence[Any]) -> list[Any]:
    """Replace each large array that equals the one in the first state by that one, so that a checkpoint stores it once.

    Args:
        states: what `save` returned for each environment of a vector.

    Returns:
        The states with shared arrays.
    """
    return [_share(state, states[0]) for state in states]


def _share(node: Any, first: Any) -> Any:
    if node is first:
        return node
    if isinstance(node, np.ndarray):
        return first if isinstance(first, np.ndarray) and _is_same(node, first) else node
    if isinstance(node, dict) and isinstance(first, dict):
        return {key: _share(value, first.get(key)) for key, value in node.items()}
    if isinstance(node, list) and isinstance(first, list) and len(node) == len(first):
        return [_share(value, other) for value, other in zip(node, first, strict=True)]
    return node


def _is_same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Return True if both arrays are large and equal bit for bit."""
    if one.nbytes < _SMALLEST_SHARED_BYTES or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return np.array_equal(one.reshape(-1).view(np.uint8), other.reshape(-1).view(np.uint8))


def sizes(state: Any) -> tuple[int, int]:
    """Return about how many bytes of JSON text, and of arrays, a state takes in a checkpoint."""
    arrays: dict[int, int] = {}
    text = _text_bytes(state, arrays)
    return text, sum(arrays.values())


def _text_bytes(node: Any, arrays: dict[int, int]) -> int:
    """Return about how many bytes of JSON text a part of a state takes; add the size of each array to `arrays`.

    `arrays` holds the sizes by the arrays' ids, so that an array in several places counts once.
    """
    if isinstance(node, np.ndarray):
        arrays[id(node)] = node.nbytes
        return 150  # its entry in the header of the file
    if isinstance(node, dict):
        return sum(8 + len(key) + _text_bytes(value, arrays) for key, value in node.items())
    if isinstance(node, list):
        return 2 + sum(_text_bytes(item, arrays) for item in node)
    if isinstance(node, str):
        if node.isascii() and node.isprintable():
            return 4 + len(node) + 3 * (node.count('"') + node.count("\\"))
        return 4 + 7 * len(node)  # each character becomes "\\u20ac" or the like
    return 26 if not isinstance(node, int) or abs(node) < 1 << 64 else node.bit_length()
