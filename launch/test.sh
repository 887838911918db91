#!/usr/bin/env bash
# Set up the environment, then lint, type-check and run the tests. All checks run, even after one has failed.
#
#   launch/test.sh                     everything: about 25 minutes on 2 cores
#   launch/test.sh --fast              only the unit tests: about 6 minutes
#   launch/test.sh tests/launch -k x   other arguments go to pytest; a path replaces all tests
#
# Test files run in parallel. Environment:
#   HVDQN_TEST_WORKERS       how many at a time; default: cores + 2, at most 8; 0 (for --pdb): in this process
#   HVDQN_TEST_IMAGE=0       skip the tests of the image
#   HVDQN_CHAOS_MINUTES=20   how long the test with random faults runs
#   CI=true                  fail if shellcheck is missing
# The settings of setup.sh (HVDQN_VENV, ...) apply here too.
#
# Exit code: 0 if all passed, 1 if a check failed, else that of setup.sh.
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
        export OMPI_MCA_plm=isolated # otherwise Open MPI needs ssh even for one host
    fi

    check "ruff check" ruff check .
    check "ruff format" ruff format --check .
    check "mypy" mypy --strict hvdqn
    check "shellcheck" check_scripts
    # Last, so that the output ends with pytest's summary.
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
