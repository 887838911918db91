"""Link to checkpoints, by symbolic links or, on file systems without them, by text files that hold the name."""

from __future__ import annotations

from pathlib import Path

_LONGEST_NAME = 200


def write_link(link: Path, target: str) -> bool:
    """Make `link` point at `target`, a name in the same folder, atomically; return False if it is a text file now.

    Raises:
        OSError: neither a symbolic link nor a text file can be written.
    """
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    is_symbolic = True
    try:
        temporary.symlink_to(target)
    except (OSError, NotImplementedError):
        temporary.write_text(target + "\n", encoding="utf-8")
        is_symbolic = False
    temporary.replace(link)
    return is_symbolic


def follow_link(path: Path) -> Path:
    """Return the folder that a text file from `write_link` names; return any other path unchanged."""
    try:
        if not path.is_file() or path.stat().st_size > _LONGEST_NAME:
            return path
        name = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return path
    # A link names an entry of its own folder, and nothing outside of it.
    return path.with_name(name) if name and Path(name).name == name and name != ".." else path
