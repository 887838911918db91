"""The set-up scripts: wrong input, a machine without a compiler, a second run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.readme import command

REPO = Path(__file__).resolve().parents[2]
VENV = Path(sys.prefix)
pytestmark = pytest.mark.launch


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of the scripts with these settings, and without those of the caller's environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HVDQN_", "HOROVOD_"))}
    kept["PATH"] = f"{VENV / 'bin'}{os.pathsep}{kept['PATH']}"
    return subprocess.run(
        [REPO / "launch" / script, *arguments],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def one_line(text: str) -> str:
    assert text.count("\n") == 1, f"expected one line, got:\n{text}"
    return text


def path_without(folder: Path, *prefixes: str) -> str:
    """Return a PATH to `folder`, which gets links to all programs but those with these prefixes."""
    folder.mkdir()
    for place in [VENV / "bin", *map(Path, os.environ["PATH"].split(os.pathsep))]:
        for program in place.iterdir() if place.is_dir() else ():
            link = folder / program.name
            if not program.name.startswith(prefixes) and not link.is_symlink():
                link.symlink_to(program)
    return str(folder)


@pytest.fixture
def bare_venv(tmp_path: Path) -> Path:
    """Return an environment that finds this one's packages but was not made by setup.sh."""
    folder = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
    here = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    inside = folder / here.relative_to(VENV)
    (inside / "outer.pth").write_text(f"{here}\n")
    return folder


def test_without_a_compiler_horovod_says_so_and_exits_3(bare_venv: Path, tmp_path: Path) -> None:
    result = run(
        "install_horovod.sh",
        PATH=path_without(tmp_path / "programs", "c++", "g++", "clang"),
        CXX="",
        HVDQN_VENV=str(bare_venv),
        XDG_CACHE_HOME=str(tmp_path),
    )
    assert result.returncode == 3, result.stdout + result.stderr
    message = one_line(result.stderr)
    assert "no C++ compiler found" in message
    assert "torchrun" in message
    assert not (bare_venv / ".hvdqn-horovod").exists()


def test_a_space_in_the_path_of_mpi_is_named_where_horovod_must_be_built(
    bare_venv: Path, tmp_path: Path
) -> None:
    """CMake splits what `mpicxx` prints at spaces. A wheel that was built elsewhere can be installed."""
    venv = bare_venv.rename(tmp_path / "my venv")
    wrapper = venv / "bin" / "mpicxx"
    wrapper.write_text(f"#!/bin/sh\necho 'c++ -I{venv}/include -L{venv}/lib -lmpi'\n")
    wrapper.chmod(0o755)
    result = run("install_horovod.sh", HVDQN_VENV=str(venv), XDG_CACHE_HOME=str(tmp_path))
    assert result.returncode == 3, result.stdout + result.stderr
    assert f"whose path has a space: {venv}; move the environment" in one_line(result.stderr)


def test_a_compiler_that_is_too_old_is_named(bare_venv: Path, tmp_path: Path) -> None:
    old = tmp_path / "old-c++"
    old.write_text("#!/bin/sh\necho \"error: unrecognized option '-std=c++20'\" >&2\nexit 1\n")
    old.chmod(0o755)
    result = run("install_horovod.sh", CXX=str(old), HVDQN_VENV=str(bare_venv), XDG_CACHE_HOME=str(tmp_path))
    assert result.returncode == 3, result.stdout + result.stderr
    assert f"{old} cannot compile C++20" in one_line(result.stderr)


def test_a_gpu_build_needs_a_torch_with_cuda(bare_venv: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.version.cuda is not None:
        pytest.skip("torch has CUDA here: whether --gpu is possible depends on the toolkit")
    result = run("install_horovod.sh", "--gpu", HVDQN_VENV=str(bare_venv), XDG_CACHE_HOME=str(tmp_path))
    assert result.returncode == 2, result.stdout + result.stderr
    assert "has no CUDA" in one_line(result.stderr)


def test_a_gpu_build_is_kept_on_a_host_without_a_gpu(bare_venv: Path, tmp_path: Path) -> None:
    """On a login node a set-up without flags must not replace the build of `--gpu`, which running jobs may use."""
    settings = {
        "PATH": path_without(tmp_path / "programs", "c++", "g++", "clang", "nvidia-smi", "nvcc"),
        "CXX": "",
        "HVDQN_VENV": str(bare_venv),
        "XDG_CACHE_HOME": str(tmp_path),
    }
    assert run("install_horovod.sh", **settings).returncode == 3  # it would build one for the CPU
    (slot,) = (tmp_path / "hvdqn" / "wheels").iterdir()
    assert "-cpu" in slot.name
    built = slot.name.replace("-cpu", "-cuda13.0")
    (bare_venv / ".hvdqn-horovod").write_text(f"{built}\n")
    result = run("install_horovod.sh", **settings)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"is installed ({built})" in result.stdout
    assert run("install_horovod.sh", "--cpu", **settings).returncode == 3
    (bare_venv / ".hvdqn-horovod").write_text(f"{built}\n".replace("-torch", "-torch1"))
    assert run("install_horovod.sh", **settings).returncode == 3  # it is for another torch


@pytest.fixture
def python_3_8(tmp_path: Path) -> Path:
    """Return a program that runs this Python but reports version 3.8."""
    code, program = tmp_path / "python3.8.py", tmp_path / "python3.8"
    program.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{code}' \"$@\"\n")
    code.write_text(
        "import sys\n"
        "sys.version_info = (3, 8, 18, 'final', 0)\n"
        "assert sys.argv[1] == '-c'\n"
        "exec(sys.argv[2])\n"
    )
    program.chmod(0o755)
    return program


def test_an_old_python_is_refused(python_3_8: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    result = run("setup.sh", HVDQN_PYTHON=str(python_3_8), HVDQN_VENV=str(venv))
    assert result.returncode == 2
    message = one_line(result.stderr)
    assert "3.8.18" in message
    assert ">= 3.10" in message
    assert not venv.exists()


@pytest.mark.parametrize(
    ("script", "arguments", "environment", "expected"),
    [
        ("setup.sh", ["--tests"], {}, "unknown argument '--tests'; known: --test"),
        ("setup.sh", [], {"HVDQN_PYTHON": "/nowhere/python3"}, "/nowhere/python3 is not a Python that runs"),
        ("setup.sh", [], {"HVDQN_VENV": "/proc/none"}, "cannot write /proc/none"),
        ("install_horovod.sh", ["--rocm"], {}, "unknown argument '--rocm'; known: --gpu --cpu"),
        ("install_horovod.sh", [], {"HVDQN_HOROVOD": "tpu"}, "HVDQN_HOROVOD='tpu' is unknown"),
        ("install_horovod.sh", [], {"HVDQN_VENV": "/nowhere"}, "no Python at /nowhere/bin/python"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(
    script: str, arguments: list[str], environment: dict[str, str], expected: str
) -> None:
    result = run(script, *arguments, **environment)
    assert result.returncode == 2, result.stdout + result.stderr
    assert expected in one_line(result.stderr)


def test_the_mpi_of_the_system_must_be_there(tmp_path: Path) -> None:
    result = run(
        "setup.sh",
        PATH=path_without(tmp_path / "programs", "mpi"),
        HVDQN_VENV=str(tmp_path / "venv"),
        HVDQN_SYSTEM_MPI="1",
    )
    assert result.returncode == 2, result.stdout + result.stderr
    assert "no mpicxx in PATH" in one_line(result.stderr)


def test_what_site_env_sets_reaches_set_up(tmp_path: Path) -> None:
    """Every setting of the example is turned on, and the file is sourced as in a login shell."""
    example = (REPO / "slurm" / "site.env.example").read_text()
    set_up = (REPO / "launch" / "setup.sh").read_text()
    site = tmp_path / "site.env"
    site.write_text(re.sub(r"^# (?=(export )?[A-Z]\w+=|module )", "", example, flags=re.MULTILINE))
    exported = subprocess.run(
        [
            "bash",
            "-ec",
            'module() { test -n "$2" || test "$1" = purge; }; source "$1"; exec env',
            "bash",
            site,
        ],
        env={"PATH": os.environ["PATH"], "HOME": "/home/me", "SCRATCH": "/scratch"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    read = set(re.findall(r"^#   (HVDQN_\w+)", set_up, re.MULTILINE)) & set(re.findall(r"HVDQN_\w+", example))
    assert read >= {"HVDQN_TORCH", "HVDQN_SYSTEM_MPI"}
    assert read <= set(re.findall(r"^(\w+)=.", exported, re.MULTILINE))
    (torch,) = re.findall(r"^readonly default_torch=(\d+\.\d+)", set_up, re.MULTILINE)
    assert f"The default, torch {torch}, is for CUDA 13:\n# module load cuda/13." in example


def test_a_moved_environment_is_refused(tmp_path: Path) -> None:
    """Its scripts would run the Python in the folder where it was made."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True, timeout=60)
    (tmp_path / "venv" / ".hvdqn-path").write_text("/elsewhere/.venv\n")
    result = run("setup.sh", HVDQN_VENV=str(tmp_path / "venv"))
    assert result.returncode == 2
    assert "was made as /elsewhere/.venv and cannot be moved" in one_line(result.stderr)


def require_set_up() -> None:
    """Skip without an environment that is this clone's own: set-up would point that of another clone to this one."""
    installed = json.loads(metadata.distribution("hvdqn").read_text("direct_url.json") or "{}")
    if not (VENV / ".hvdqn-all,test").is_file() or installed.get("url") != REPO.as_uri():
        pytest.skip(f"{VENV} was not made by launch/setup.sh --test of this clone: run launch/test.sh")


def test_a_second_set_up_changes_nothing() -> None:
    require_set_up()

    def contents() -> list[str]:
        return sorted(str(path) for path in VENV.glob("lib/python*/site-packages/*"))

    before = contents()
    result = run(command("./launch/setup.sh").removeprefix("./launch/"), "--test", HVDQN_VENV=str(VENV))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "is up to date" in result.stdout
    assert contents() == before


def quickstart(folder: Path, **environment: str) -> str:
    """Run README's command with a short training; return its output."""
    script = command("./launch/quickstart.sh").removeprefix("./launch/")
    result = run(script, "--preset", "smoke", "--run-dir", str(folder), **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^Greedy evaluation  mean [\d.]+, .* over 4 episodes$", result.stdout, re.MULTILINE)
    assert re.search(
        rf"^Checkpoint +{re.escape(str(folder))}/checkpoints/0*2000$", result.stdout, re.MULTILINE
    ), result.stdout
    assert (folder / "curve.png").stat().st_size > 10_000
    return result.stdout + result.stderr


def test_quickstart_trains_and_prints_the_paths(tmp_path: Path) -> None:
    require_set_up()
    assert "Training on 2 ranks with horovodrun" in quickstart(tmp_path, HVDQN_VENV=str(VENV))


def test_quickstart_fails_if_cartpole_is_not_solved(tmp_path: Path) -> None:
    """Without a preset it trains CartPole, which needs more steps than these."""
    require_set_up()
    script = command("./launch/quickstart.sh").removeprefix("./launch/")
    few = ("--total-env-steps", "1500", "--eval-episodes", "2", "--run_dir", str(tmp_path))
    result = run(script, *few, HVDQN_VENV=str(VENV))
    assert result.returncode == 1, result.stdout + result.stderr
    assert "is below 475, where CartPole-v1 counts as solved" in result.stderr
    assert f"hvdqn eval {tmp_path}\n" in result.stdout


def test_quickstart_without_a_compiler_trains_with_torchrun(bare_venv: Path, tmp_path: Path) -> None:
    require_set_up()
    stamp_packages(bare_venv)
    path = path_without(tmp_path / "programs", "c++", "g++", "clang")
    output = quickstart(tmp_path / "run", HVDQN_VENV=str(bare_venv), PATH=path, CXX="")
    assert "no C++ compiler found" in output
    assert "Training on 2 ranks with torchrun (Horovod is not installed)" in output


def stamp_packages(venv: Path) -> None:
    """Write the stamp that setup.sh leaves when it has installed everything but Horovod."""
    files = [(REPO / name).read_text() for name in ("pyproject.toml", "launch/setup.sh")]
    (torch,) = re.findall(r"^readonly default_torch=(\S+)$", files[1], re.MULTILINE)
    python = ".".join(map(str, sys.version_info[:3]))
    settings = ["all", torch, python, "", str(venv), str(REPO)]
    text = "".join([*(f"{line}\n" for line in settings), *files])
    (venv / ".hvdqn-all").write_text(hashlib.sha256(text.encode()).hexdigest())


def test_a_clone_named_hvdqn_is_not_imported_as_the_package(tmp_path: Path) -> None:
    """`git clone .../hvdqn && hvdqn/launch/quickstart.sh`: `python -m` searches the current folder first."""
    require_set_up()
    (tmp_path / "hvdqn").symlink_to(REPO)
    result = subprocess.run(
        [sys.executable, "-c", "import hvdqn; print(hvdqn.__version__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
