"""Print what a build of Horovod depends on in this environment: `python -m hvdqn.launchers.horovod_build`.

launch/install_horovod.sh reads the output, one value per line: the tag of this Python, the version of torch, its CUDA
version (empty if it has none), the folder of the NCCL that came with it (empty if there is none), the path of Python.h,
and the version of the installed Horovod (or none).

It reads torch/version.py instead of importing torch, which takes seconds: quickstart.sh runs this at every start.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import runpy
import sys
import sysconfig
from pathlib import Path


def build_inputs() -> list[str]:
    """Return the values that this program prints, in the order above.

    Raises:
        ModuleNotFoundError: torch is not installed.
    """
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise ModuleNotFoundError("torch is missing")
    folder = Path(torch.origin).parent
    about = runpy.run_path(str(folder / "version.py"))
    nccl = folder.parent / "nvidia" / "nccl"
    try:
        horovod = importlib.metadata.version("horovod")
    except importlib.metadata.PackageNotFoundError:
        horovod = "none"
    return [
        f"cp{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}",
        about["__version__"],
        about["cuda"] or "",
        str(nccl) if (nccl / "include" / "nccl.h").is_file() else "",
        str(Path(sysconfig.get_path("include")) / "Python.h"),
        horovod,
    ]


if __name__ == "__main__":
    try:
        values = build_inputs()
    except ModuleNotFoundError as error:
        sys.exit(str(error))
    for value in values:
        print(value)
