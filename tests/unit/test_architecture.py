"""The shape of the package: which file may import which, and how large files and functions may be.

Everything is read from the source, so that no optional library has to be installed.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hvdqn"

# A room is a package or module directly in hvdqn/. It may import rooms of its own layer and of the layers above it in
# this list, never of a layer below it.
LAYERS = (
    {"errors", "hvdqn", "links", "paths", "step"},
    {"comm", "config", "logs"},
    {"clock", "graphs", "losses", "optimizers", "role", "seeds", "trust"},
    {"envs", "faults", "metrics", "networks", "plot", "replay"},
    {
        "acting",
        "checkpoint",
        "dense_update",
        "devices",
        "learner",
        "prefill",
        "process",
        "provenance",
        "rank",
        "run_directory",
        "sync",
    },
    {"parts"},
    {
        "api",
        "callbacks",
        "evaluate",
        "export",
        "policy",
        "recorder",
        "startup",
        "summary",
        "trainer",
        "video",
    },
    {"bench", "elastic", "job", "launchers", "presets", "train", "tune"},
    {"__main__"},
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

# Imports that the layers would allow and that are wrong all the same.
FORBIDDEN: Mapping[str, set[str]] = {
    "errors": {"hvdqn"},
    "learner": {"sync"},
    # These know nothing of ranks.
    "losses": {"comm", "role"},
    "networks": {"comm", "faults", "role"},
    "replay": {"comm", "faults", "role"},
}

# The only files and rooms that may import a library, at the top of a file or inside a function.
ONLY: Mapping[str, set[str]] = {
    "horovod": {"comm/horovod.py", "elastic", "launchers"},
    "mpi4py": {"comm/mpi.py", "sync/server.py"},
    "ale_py": {"envs/atari.py", "envs/atari_variant.py", "envs/make.py", "bench/peer_sb3.py"},
    "stable_baselines3": {"bench/peer_sb3.py", "bench/peer_sbx.py"},
    "sbx": {"bench/peer_sbx.py"},
    "minatar": {"envs/make.py"},
    "matplotlib": {"plot", "bench/scaling.py"},
    "scipy": {"plot"},
    "onnxruntime": {"export.py"},
    "minari": {"prefill.py"},
    "wandb": {"metrics/tracking.py"},
    "mlflow": {"metrics/tracking.py"},
    "optuna": {"tune"},
}

MOST_FILE_LINES = 400
MOST_FUNCTION_LINES = 50
FILE_LINES = {"train.py": 200, "trainer.py": 250}
LONG_FILES = {"config/settings.py"}

# Files and rooms that write to standard error themselves; all others use `logging`. Commands other than training refuse
# wrong input with a prefix of their own, as `hvdqn eval: error: `.
MAY_PRINT_TO_STDERR = {
    "logs",
    "launchers",
    "__main__",
    "evaluate",
    "export",
    "plot",
    "presets",
    "tune",
    "bench/report.py",
}

FILES = sorted(PACKAGE.rglob("*.py"))
PUBLIC_API = PACKAGE / "__init__.py"


def name_of(path: Path) -> str:
    """Return a file's path inside the package, such as `comm/mpi.py`."""
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    """Return `comm` for comm/mpi.py, `train` for train.py, and `hvdqn` for the package's own `__init__.py`."""
    first = path.relative_to(PACKAGE).parts[0]
    return "hvdqn" if first == "__init__.py" else first.removesuffix(".py")


def belongs_to(path: Path, places: set[str]) -> bool:
    """Return True if the file, or the room it is in, is one of these places."""
    return name_of(path) in places or room_of(path) in places


@functools.cache
def syntax_tree(path: Path) -> ast.Module:
    """Return the parsed source of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def nodes(tree: ast.AST, type_checking: bool = True, functions: bool = True) -> Iterator[ast.AST]:
    """Yield the nodes below `tree`, if wanted without those in `if TYPE_CHECKING` and in functions."""
    for child in ast.iter_child_nodes(tree):
        if (
            isinstance(child, ast.If)
            and ast.unparse(child.test).endswith("TYPE_CHECKING")
            and not type_checking
        ):
            for branch in child.orelse:
                yield branch
                yield from nodes(branch, type_checking, functions)
        elif functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from nodes(child, type_checking, functions)


@functools.cache
def imports(path: Path, type_checking: bool = True, functions: bool = True) -> frozenset[str]:
    """Return the modules that a file imports, if wanted without type checkers' imports and those in functions."""
    found: set[str] = set()
    for node in nodes(syntax_tree(path), type_checking, functions):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: use absolute imports"
            assert node.module is not None
            # `from hvdqn.comm import auto` imports the module hvdqn.comm.auto.
            found.update(
                f"{node.module}.{alias.name}" if is_module(node.module, alias.name) else node.module
                for alias in node.names
            )
    return frozenset(found)


def is_module(package: str, name: str) -> bool:
    """Return True if `name` is a module or package of hvdqn inside `package`."""
    first, *others = package.split(".")
    folder = PACKAGE.joinpath(*others)
    return first == "hvdqn" and ((folder / f"{name}.py").exists() or (folder / name).is_dir())


def file_of(module: str) -> Path:
    """Return the file of a module of hvdqn."""
    place = PACKAGE.joinpath(*module.split(".")[1:])
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def files_imported(path: Path, type_checking: bool = True) -> set[Path]:
    """Return the other files of the project that a file imports."""
    modules = (name for name in imports(path, type_checking) if name.split(".")[0] == "hvdqn")
    return {file_of(module) for module in modules} - {path}


def rooms_imported(path: Path) -> set[str]:
    """Return the other rooms of the project that a file imports."""
    return {room_of(file) for file in files_imported(path)} - {room_of(path)}


def libraries_imported(path: Path, type_checking: bool = True) -> set[str]:
    """Return the top-level names of the modules that a file imports."""
    return {name.split(".")[0] for name in imports(path, type_checking)}


def assert_no_circle(graph: Mapping[str, set[str]]) -> None:
    """Fail and show the circle if the edges of `graph` contain one."""
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " imports ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def functions_of(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Return all functions of a file, methods and nested functions included."""
    return [
        node
        for node in ast.walk(syntax_tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


# Imports


@pytest.mark.parametrize("path", [path for path in FILES if path != PUBLIC_API], ids=name_of)
def test_imports_follow_the_layers(path: Path) -> None:
    room = room_of(path)
    assert room in LEVEL, f"'{room}' is a new room: add it to LAYERS"
    lower = {other for other in rooms_imported(path) if LEVEL.get(other, len(LAYERS)) > LEVEL[room]}
    forbidden = rooms_imported(path) & FORBIDDEN.get(room, set())
    assert lower | forbidden == set()


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("comm/*.py")), ids=name_of)
def test_comm_imports_nothing_of_the_project_but_errors(path: Path) -> None:
    assert rooms_imported(path) <= {"errors"}


def test_the_public_api_is_imported_lazily() -> None:
    """`import hvdqn` imports no other file of the project, so every file may import `hvdqn` for its version."""
    modules = imports(PUBLIC_API, type_checking=False, functions=False)
    assert not {name for name in modules if name.split(".")[0] == "hvdqn"}


def test_no_circle_between_files() -> None:
    """Imports for type checkers and in functions count: files that need each other are one file."""
    assert_no_circle(
        {
            name_of(path): {name_of(file) for file in files_imported(path)}
            for path in FILES
            if path != PUBLIC_API
        }
        | {name_of(PUBLIC_API): set()}
    )


def test_no_circle_between_rooms() -> None:
    graph: dict[str, set[str]] = {room_of(path): set() for path in FILES}
    for path in FILES:
        if path != PUBLIC_API:
            graph[room_of(path)] |= rooms_imported(path)
    assert_no_circle(graph)


@pytest.mark.parametrize("library", ONLY)
def test_a_library_is_imported_only_in_its_place(library: str) -> None:
    importers = [path for path in FILES if library in libraries_imported(path, type_checking=False)]
    assert [name_of(path) for path in importers if not belongs_to(path, ONLY[library])] == []


@pytest.mark.parametrize("room", ["config", "plot", "errors"])
def test_a_room_without_torch(room: str) -> None:
    """`--help`, wrong flags and plots do not wait for `import torch`, which takes seconds."""
    reached: set[Path] = set()
    waiting = {path for path in FILES if room_of(path) == room}
    assert waiting
    while waiting:
        path = waiting.pop()
        reached.add(path)
        # Importing hvdqn/metrics/console.py runs hvdqn/metrics/__init__.py first.
        packages = {parent / "__init__.py" for parent in path.parents if parent.is_relative_to(PACKAGE)}
        waiting |= (files_imported(path, type_checking=False) | packages) - reached - {PUBLIC_API}
    slow = [name_of(path) for path in reached if "torch" in libraries_imported(path, type_checking=False)]
    assert not slow


# Sizes


@pytest.mark.parametrize("path", [path for path in FILES if name_of(path) not in LONG_FILES], ids=name_of)
def test_no_file_is_too_long(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    most = FILE_LINES.get(name_of(path), MOST_FILE_LINES)
    assert lines <= most


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_function_is_too_long(path: Path) -> None:
    """From `def` to the last line, docstring included."""
    lengths = [(node.name, (node.end_lineno or 0) - node.lineno + 1) for node in functions_of(path)]
    assert [(name, lines) for name, lines in lengths if lines > MOST_FUNCTION_LINES] == []


# Messages and docstrings


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_messages_are_logged_and_not_printed_to_stderr(path: Path) -> None:
    if belongs_to(path, MAY_PRINT_TO_STDERR):
        return
    calls = [node for node in ast.walk(syntax_tree(path)) if isinstance(node, ast.Call)]
    printed = [
        call.lineno
        for call in calls
        if ast.unparse(call.func) == "sys.stderr.write"
        or any(
            keyword.arg == "file" and ast.unparse(keyword.value) == "sys.stderr" for keyword in call.keywords
        )
    ]
    assert not printed, f"{name_of(path)} writes to sys.stderr in lines {printed}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_docstring_begins_with_one_sentence(path: Path) -> None:
    """Public functions and classes have a docstring whose first line ends with a period."""
    wrong = []
    for node in public_definitions(syntax_tree(path)):
        summary, _, _ = (ast.get_docstring(node) or "").partition("\n")
        if not summary.endswith("."):
            wrong.append(f"{node.name}: {summary!r}")
    assert wrong == []


def public_definitions(tree: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Yield the public functions and classes, and the public methods of public classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node)
