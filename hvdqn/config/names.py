"""Names that a user writes: suggestions for misspelled ones, and imports of `module:attribute`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from hvdqn.errors import UserError


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'a' or 'b'?` with the known words closest to `word`, or "" if none is close."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""


def import_module(module: str, flag: str) -> ModuleType:
    """Import and return a module that the user named with a flag.

    Raises:
        UserError: it cannot be imported.
    """
    if not all(part.isidentifier() for part in module.split(".")):
        raise UserError(f"{flag}: '{module}' is no module's name; write package.module, without path and .py")
    try:
        return importlib.import_module(module)
    except SystemExit as error:
        raise UserError(
            f"{flag}: '{module}' calls sys.exit({error.code!r}) when it is imported; put what it runs below "
            "if __name__ == '__main__'"
        ) from error
    except ImportError as error:
        raise UserError(
            f"{flag}: cannot import '{module}' ({' '.join(str(error).split())}); install it or put it on PYTHONPATH"
        ) from error


def import_attribute(path: str, flag: str) -> Any:
    """Import and return the attribute that `module:attribute` names.

    Raises:
        UserError: the module cannot be imported or has no such attribute.
    """
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise UserError(f"{flag} '{path}' is not of the form module:attribute")
    found = getattr(import_module(module, f"{flag} '{path}'"), attribute, None)
    if found is None:
        raise UserError(f"{flag} '{path}': module '{module}' has no '{attribute}'")
    return found
