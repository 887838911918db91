"""Run horovodrun, but end a failed job with the rank's own exit code and without a traceback.

    python -m hvdqn.launchers.horovodrun FLAGS... COMMAND...

The flags are those of horovodrun, which ends every failed job with a traceback and exit code 1.
"""

from __future__ import annotations

import re
import sys


def exit_code(message: str) -> int | None:
    """Return the exit code of the first rank that failed: 128 + n if it was killed by signal n.

    Args:
        message: the text of the exception that horovodrun raises.

    Returns:
        The code, None if the message names no rank.
    """
    found = re.search(r"Process name: \d+\nExit code: (-?\d+)", message)
    if found is None:
        return None
    code = int(found[1])
    return code if code >= 0 else 128 - code


def main() -> None:
    """Run horovodrun with this program's arguments; exit with the code of the job."""
    from horovod.runner.launch import run_commandline

    sys.argv[0] = "horovodrun"  # the name in its usage message
    try:
        run_commandline()
    except Exception as error:
        code = exit_code(str(error))
        sys.exit(f"horovodrun.sh: error: {error}" if code is None else code)


if __name__ == "__main__":
    main()
