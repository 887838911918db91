"""Imports point one way. Read from the source, so that nothing need be installed to hold it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hvdqn"

# A room may import from rooms before it and from its own files, never from rooms after it.
LAYERS = (
    {"hvdqn"},
    {"errors", "step"},
    {"presets"},
    {"config"},
    {"clock", "comm", "graphs", "losses", "metrics", "optimizers", "replay", "seeds", "trailer"},
    {"envs", "networks", "plot"},
    {"checkpoint", "faults", "sync"},
    {"acting", "learner"},
    {"parts", "video"},
    {"evaluate", "export", "resume"},
    {"train"},
    {"bench", "elastic"},
    {"__main__"},
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

# Who alone may import a library, wherever in the file.
ONLY = {
    "horovod": {"comm/horovod.py"},
    "mpi4py": {"comm/mpi.py", "sync/server.py"},
    "ale_py": {"envs/atari.py", "envs/make.py", "bench/peer_sb3.py"},
    "stable_baselines3": {"bench/peer_sb3.py"},
    "minatar": {"envs/make.py"},
    "matplotlib": {"plot/command.py", "plot/drawing.py", "bench/scaling.py"},
}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    """`comm` of comm/mpi.py, `train` of train.py, `hvdqn` of the package itself."""
    first = path.relative_to(PACKAGE).parts[0]
    return "hvdqn" if first == "__init__.py" else first.removesuffix(".py")


def imports(path: Path) -> set[str]:
    """The modules that a file imports when it runs, in functions too; what only type checkers read is left out."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for branch in node.orelse:
                visit(branch)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            # `from hvdqn import x` and `from hvdqn.comm import auto` may name modules.
            found.update(
                f"{node.module}.{alias.name}" if is_module(node.module, alias.name) else node.module
                for alias in node.names
            )
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def is_module(package: str, name: str) -> bool:
    parts = package.split(".")
    if parts[0] != "hvdqn":
        return False
    folder = PACKAGE.joinpath(*parts[1:])
    return (folder / f"{name}.py").exists() or (folder / name).is_dir()


def rooms_imported(path: Path) -> set[str]:
    """Other rooms of the project that a file imports."""
    modules = [name.split(".") for name in imports(path) if name.split(".")[0] == "hvdqn"]
    return {"hvdqn" if len(parts) == 1 else parts[1] for parts in modules} - {room_of(path)}


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    assert room_of(path) in LEVEL, f"{name_of(path)} is a new room: say in LAYERS where it stands"
    for room in rooms_imported(path):
        assert LEVEL[room] < LEVEL[room_of(path)], f"{name_of(path)} imports {room}"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("comm/*.py")), ids=name_of)
def test_comm_imports_nothing_of_the_project_but_errors(path: Path) -> None:
    assert rooms_imported(path) <= {"errors"}


@pytest.mark.parametrize("room", ["replay", "losses", "networks"])
def test_some_rooms_have_never_heard_of_ranks(room: str) -> None:
    mine = [path for path in files() if room_of(path) == room]
    assert mine
    for path in mine:
        assert rooms_imported(path).isdisjoint({"comm", "sync", "learner", "parts", "train"}), name_of(path)


@pytest.mark.parametrize("library", ONLY)
def test_a_library_has_its_place(library: str) -> None:
    users = {name_of(path) for path in files() if any(m.split(".")[0] == library for m in imports(path))}
    assert users <= ONLY[library]


@pytest.mark.parametrize("room", ["config", "presets", "plot"])
def test_without_torch(room: str) -> None:
    """Directly or through what they import: `--help`, wrong flags and plots must not wait for torch."""
    reached, waiting = set(), {room}
    while waiting:
        reached |= waiting
        waiting = {
            found for path in files() if room_of(path) in waiting for found in rooms_imported(path)
        } - reached
    for path in files():
        if room_of(path) in reached:
            assert not any(m.split(".")[0] == "torch" for m in imports(path)), name_of(path)


def test_rooms_are_importable_in_any_order() -> None:
    """No cycle between files: whoever imports one file imports no file that is still half done."""
    graph = {name_of(path): {name for name in map(file_of, imports(path)) if name} for path in files()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for found in sorted(graph[name] - {name}):
                visit(found, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def file_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "hvdqn":
        return None
    place = PACKAGE.joinpath(*parts[1:])
    return name_of(place / "__init__.py") if place.is_dir() else name_of(place.with_suffix(".py"))
