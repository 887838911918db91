#!/usr/bin/env bash
# Train with horovodrun, on this host or on several.
#
#   launch/horovodrun.sh -np 8 -- --preset atari --env ALE/Breakout-v5
#   launch/horovodrun.sh --hosts h1:4,h2:4 --interfaces eth0 -- --preset atari --run-dir /shared/runs/breakout
#   launch/horovodrun.sh -np 2 --gloo -- --preset smoke
#
#   --mpi     start ranks with mpirun and send small tensors over MPI (the default, and faster)
#   --gloo    start ranks over ssh, without MPI; for hosts that have no MPI in common
#
# Stalls: Horovod prints a warning when some ranks have waited for others for 60 s. After --stall-timeout (600 s) hvdqn
# names the rank that hangs and ends the job. For Horovod's own limits (HOROVOD_STALL_...) see horovodrun --help.
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

main() {
    controller=mpi
    prepare "$@"
    need_module horovod "run launch/install_horovod.sh, or start with launch/torchrun.sh"

    local flags=(
        -np "$np" "--$controller"
        # Its cache in ~/.horovod would reuse for an hour, in all jobs, what it once found out about hosts.
        --disable-cache
    )
    [[ -z $hosts ]] || flags+=(-H "$hosts")
    # Otherwise it starts a probe on every host and uses the interfaces that all have in common.
    [[ -z $interfaces ]] || flags+=(--network-interfaces "$interfaces")

    if [[ $controller == mpi ]]; then
        mpi_settings
        # One string, which a shell reads. Without orte_tag_output 0, mpirun puts '[1,0]<stdout>:' into the output.
        local word words="--mca orte_tag_output 0"
        for word in "${mpi_args[@]}" "${launcher_args[@]}"; do words+=" $(quote "$word")"; done
        flags+=("--mpi-args=$words")
    else
        check_hosts "$python"
        flags+=("${launcher_args[@]}")
    fi
    # The defaults of 30 s are too short for slow imports and for ranks that wait during an evaluation.
    export HOROVOD_START_TIMEOUT=${HOROVOD_START_TIMEOUT:-120}
    export HOROVOD_GLOO_TIMEOUT_SECONDS=${HOROVOD_GLOO_TIMEOUT_SECONDS:-600}
    wrap_command
    compose_environment
    run_launcher "$python" -m hvdqn.launchers.horovodrun "${flags[@]}" "${command[@]}"
}

main "$@"
