#!/usr/bin/env bash
# Set up, then lint, type-check and run the tests. Every check runs even if one before it failed.
#
#   launch/test.sh                     everything: some 11 minutes on 2 cores
#   launch/test.sh --fast              the unit tests only: under a minute
#   launch/test.sh tests/launch -k x   other arguments go to pytest; a path given takes the place of all tests
#
# Files of tests run side by side: many tests wait more than they compute.
# Environment: HVDQN_TEST_WORKERS is how many at a time; default: cores + 2, at most 8; 0: one after the other, as --pdb
# wants it. HVDQN_TEST_IMAGE=0 leaves the image out, HVDQN_CHAOS_MINUTES=20 makes the run under random faults longer.
# CI=true makes a missing shellcheck a failure. Settings of setup.sh (HVDQN_VENV, ...) hold here too.
# Exit: 0 if all passed, 1 if a check failed, else the code of setup.sh.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
cd -- "${here%/*}"
venv=${HVDQN_VENV:-$PWD/.venv}
failed=()

check() { # check NAME COMMAND...
    local -r name=$1 began=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    if "$@"; then
        printf '   passed (%d s)\n' "$((SECONDS - began))"
    else
        failed+=("$name")
        printf '   FAILED: %s\n' "$*"
    fi
}

check_scripts() {
    if ! command -v shellcheck >/dev/null; then
        printf '   NOT RUN: shellcheck is missing (apt install shellcheck); the scripts are unchecked\n'
        [[ ${CI:-} != true ]]
        return
    fi
    local scripts
    mapfile -t scripts < <(grep -rlE '^#!.*\b(ba)?sh\b' launch slurm .ci 2>/dev/null)
    shellcheck "${scripts[@]}"
}

main() {
    local tests=()
    case ${1:-} in
        -h | --help)
            sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
            return
            ;;
        --fast)
            tests=(tests/unit)
            shift
            ;;
    esac
    "$here/setup.sh" --test
    export PATH=$venv/bin:$PATH
    if ((EUID == 0)); then # the tests start mpirun
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
    if ! command -v ssh >/dev/null; then
        export OMPI_MCA_plm=isolated # without ssh, mpirun starts ranks on one host only, and only so
    fi

    check "ruff check" ruff check .
    check "ruff format" ruff format --check .
    check "mypy" mypy --strict hvdqn
    check "shellcheck" check_scripts
    # Last, so that pytest's own summary ends the output.
    printf '\n== pytest\n'
    local workers=$(($(nproc) + 2))
    workers=${HVDQN_TEST_WORKERS:-$((workers < 8 ? workers : 8))}
    python -m pytest --numprocesses "$workers" --dist loadfile --no-loadscope-reorder --durations=15 "${tests[@]}" "$@" ||
        failed+=(pytest)

    if ((${#failed[@]})); then
        printf '\nFAILED: %s\n' "$(IFS=, && printf '%s' "${failed[*]}")"
        return 1
    fi
}

main "$@"
