"""`hvdqn launch LAUNCHER ...` and `hvdqn install-horovod`: run a script of launch/, also where there is no clone."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hvdqn.errors import EXIT_USER_ERROR

# The folder launch/ of the repository.
SCRIPTS = Path(__file__).parents[1] / "scripts"
LAUNCHERS = {
    "horovodrun": "Horovod over MPI or Gloo",
    "mpirun": "Open MPI, with Horovod or --comm mpi",
    "torchrun": "torch.distributed, without Horovod and MPI",
    "elastic": "Horovod, on hosts that come and go",
}


def main(argv: Sequence[str]) -> int:
    """Run the `hvdqn launch` command. It becomes the launch script, or returns an exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:12}{what}" for name, what in LAUNCHERS.items()]
        print("\n".join(["usage: hvdqn launch LAUNCHER [...] -- [flags of training]\n", *lines]))
        print("\n'hvdqn launch LAUNCHER --help' lists the flags of a launcher.")
        return 0
    if argv[0] in LAUNCHERS:
        run_script(f"{argv[0]}.sh", argv[1:])
    known = ", ".join(LAUNCHERS)
    print(f"hvdqn launch: error: unknown launcher '{argv[0]}'; there are {known}", file=sys.stderr)
    return EXIT_USER_ERROR


def install_horovod(argv: Sequence[str]) -> int:
    """Run the `hvdqn install-horovod` command, which becomes launch/install_horovod.sh."""
    run_script("install_horovod.sh", argv)


def run_script(name: str, arguments: Sequence[str]) -> NoReturn:
    """Become a script of launch/, which uses the Python of this process."""
    environment = dict(os.environ)
    if (Path(sys.prefix) / "bin" / "python").exists():
        environment.setdefault("HVDQN_VENV", sys.prefix)
    os.execvpe("bash", ["bash", str(SCRIPTS / name), *arguments], environment)
