"""`hvdqn install-horovod`: build Horovod against the torch of this environment, and install it."""

from __future__ import annotations

from collections.abc import Sequence

from hvdqn.launchers.launch import run_script


def main(argv: Sequence[str]) -> int:
    """Run the `hvdqn install-horovod` command, which becomes launch/install_horovod.sh."""
    run_script("install_horovod.sh", argv)
