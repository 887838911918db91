"""The wheel and the sdist: complete, and of use in an empty folder without the clone."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.launchers import REPOSITORY, clean_environment
from tests.readme import command

pytestmark = pytest.mark.launch

SCRIPTS = {"common.sh", "elastic.sh", "horovodrun.sh", "install_horovod.sh", "mpirun.sh", "torchrun.sh"}


def run(*words: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**clean_environment(), **variables}
    environment.pop("PYTHONPATH")
    return subprocess.run(
        [str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=200
    )


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the sdist and the wheel that is built from it."""
    if importlib.util.find_spec("build") is None:
        pytest.skip(
            "build is not installed: wheel and sdist are NOT tested; launch/setup.sh --test installs it"
        )
    folder = tmp_path_factory.mktemp("dist")
    # From a copy, because a build leaves files in the source.
    source = tmp_path_factory.mktemp("source") / "hvdqn"
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, check=False,
    )  # fmt: skip
    if tracked.returncode:
        pytest.skip("this is no git clone: wheel and sdist are NOT tested")
    source.mkdir()
    pipe = subprocess.run(
        ["tar", "--null", "--ignore-failed-read", "-T", "-", "-cf", "-"],
        cwd=REPOSITORY, input=tracked.stdout, capture_output=True, check=True,
    )  # fmt: skip
    subprocess.run(["tar", "-xf", "-"], cwd=source, input=pipe.stdout, check=True)
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ".", cwd=source)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def installed(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bin folder of an environment with the wheel, and this environment's packages below it."""
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=100)
    [wheel] = archives.glob("*.whl")
    python = venv / "bin" / "python"
    done = run(
        *(
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            wheel,
        ),
        cwd=venv,
    )
    assert done.returncode == 0, done.stderr
    [site] = venv.glob("lib/python*/site-packages")
    # A .pth file in a folder that another .pth file names is not read: hvdqn of the clone stays outside.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv / "bin"


def test_the_wheel_has_modules_scripts_and_metadata(archives: Path) -> None:
    [wheel] = archives.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    modules = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "hvdqn").rglob("*.py")}
    assert modules <= names
    assert {name.removeprefix("hvdqn/scripts/") for name in names if name.endswith(".sh")} == SCRIPTS
    assert "hvdqn/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "docs"))]
    for line in ("Project-URL: Homepage, https://", "Classifier: Typing :: Typed", "Provides-Extra: mlflow"):
        assert line in metadata
    # The index shows README alone, so its pictures have absolute links.
    pictures = re.findall(r"!\[[^]]*\]\(([^)\s]+)\)", metadata)
    assert pictures
    assert all(link.startswith("https://") for link in pictures)


def test_the_sdist_has_what_a_clone_has(archives: Path) -> None:
    [sdist] = archives.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("CITATION.cff", "CHANGELOG.md", "launch/setup.sh", "slurm/tune.sbatch", "docs/settings.md"):
        assert name in names
    assert {f"hvdqn/scripts/{script}" for script in SCRIPTS} <= names
    assert "tests/unit/test_config.py" in names
    assert not [name for name in names if "__pycache__" in name]


def test_train_and_launch_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    short = ("--preset", "smoke", "--total-env-steps", "600", "--eval-episodes", "2", "--comm")
    hvdqn = installed / "hvdqn"
    alone = run(hvdqn, "train", *short, "local", "--run-dir", "alone", cwd=tmp_path)
    assert alone.returncode == 0, alone
    flags = " ".join((*short, "mpi", "--run-dir", "two"))
    line = command("hvdqn launch mpirun -np 8 -- --preset atari", {"-np 8": "-np 2", "--preset atari": flags})
    two = run(installed / "hvdqn", *line.split()[1:], cwd=tmp_path)
    assert two.returncode == 0, two
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert (summary["world_size"], summary["comm"], summary["stopped_by"]) == (2, "mpi", "finished")
    assert summary["folder"] == str(tmp_path)
    assert "hvdqn_git" not in summary  # it is not a clone
    assert str(installed.parent) in (program := summary["command"].split()[0]), program
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "two"]


def test_wrong_use_of_the_scripts_is_one_line(installed: Path, tmp_path: Path) -> None:
    hvdqn = installed / "hvdqn"
    for words, message in (
        (
            ["launch", "mpiexec"],
            "unknown launcher 'mpiexec'; there are horovodrun, mpirun, torchrun, elastic",
        ),
        (["launch", "torchrun"], "how many ranks? Give -np N"),
        (["install-horovod", "--rocm"], "unknown argument '--rocm'"),
    ):
        done = run(hvdqn, *words, cwd=tmp_path)
        assert done.returncode == 2, done
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
    for words in (["launch", "--help"], ["launch", "elastic", "--help"], ["install-horovod", "--help"]):
        done = run(hvdqn, *words, cwd=tmp_path)
        assert done.returncode == 0, done
        assert len(done.stdout.splitlines()) > 4
