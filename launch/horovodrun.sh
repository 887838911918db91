#!/usr/bin/env bash
# Train with horovodrun, on this host or on several.
#
#   launch/horovodrun.sh -np 8 -- --preset atari --env ALE/Breakout-v5
#   launch/horovodrun.sh --hosts h1:4,h2:4 --interfaces eth0 -- --preset atari --run-dir /shared/runs/breakout
#   launch/horovodrun.sh -np 2 --gloo -- --preset smoke
#
#   --mpi     ranks are started by mpirun, small tensors travel over MPI (the default, and the faster one)
#   --gloo    ranks are started over ssh by horovodrun itself: where there is no MPI between the hosts
# Stalls: Horovod warns after 60 s in which some ranks wait for others; after --stall-timeout (600 s) hvdqn itself names
# the rank that hangs and ends the job. Other limits of Horovod's: HOROVOD_STALL_..., see horovodrun --help.
#
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

own_flag() {
    case $1 in
        --gloo | --mpi) controller=${1#--} && return 1 ;;
        *) return 0 ;;
    esac
}

# horovodrun ends every failed job with a traceback and 1. What it knows is in the text of its exception.
readonly horovodrun='
import re, sys
from horovod.runner.launch import run_commandline

sys.argv[0] = "horovodrun"
try:
    run_commandline()
except Exception as error:
    first = re.search(r"Process name: (\d+)\nExit code: (-?\d+)", str(error))
    if first is None:
        sys.exit(f"horovodrun.sh: error: {error}")
    code = int(first[2])
    sys.exit(code if code >= 0 else 128 - code)
'

main() {
    controller=mpi
    prepare "$@"
    need_module horovod "run launch/install_horovod.sh, or start with launch/torchrun.sh"

    local flags=(
        -np "$np" "--$controller"
        # Else it takes over for an hour, from ~/.horovod and for all jobs, what it found out about hosts once.
        --disable-cache
    )
    [[ -z $hosts ]] || flags+=(-H "$hosts")
    # Without, it starts a probe on every host and takes the interfaces that all have in common.
    [[ -z $interfaces ]] || flags+=(--network-interfaces "$interfaces")

    if [[ $controller == mpi ]]; then
        mpi_settings
        # One string, read by a shell. With the tag off, lines are not torn by '[1,0]<stdout>:'.
        local word words="--mca orte_tag_output 0"
        for word in "${mpi_args[@]}" "${launcher_args[@]}"; do words+=" $(quote "$word")"; done
        flags+=("--mpi-args=$words")
    else
        check_hosts "$python"
        flags+=("${launcher_args[@]}")
    fi
    # 30 s each by default: too short for imports from a slow network disk, and for ranks that wait for an evaluation.
    export HOROVOD_START_TIMEOUT=${HOROVOD_START_TIMEOUT:-120}
    export HOROVOD_GLOO_TIMEOUT_SECONDS=${HOROVOD_GLOO_TIMEOUT_SECONDS:-600}
    wrap_command
    compose_environment
    run_launcher "$python" -c "$horovodrun" "${flags[@]}" "${command[@]}"
}

main "$@"
