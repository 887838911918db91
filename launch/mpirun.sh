#!/usr/bin/env bash
# Train with Open MPI's mpirun, on this host or on several. Ranks average gradients with Horovod, or over MPI with
# --comm mpi.
#
#   launch/mpirun.sh -np 8 -- --preset atari --env ALE/Breakout-v5
#   launch/mpirun.sh --hosts h1:4,h2:4 --interfaces eth0 -- --preset atari --run-dir /shared/runs/breakout
#   launch/mpirun.sh -np 8 --launcher-args "--bind-to numa --report-bindings" -- --preset atari
#
# Inside an allocation of Slurm, PBS or LSF, omit --hosts: mpirun gets the hosts from there.
#
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

own_flag() { return 0; }

main() {
    prepare "$@"
    mpi_settings
    local flags=(
        -np "$np"
        # By default mpirun binds a rank to one core, which torch's and Horovod's threads would then share.
        --bind-to none --map-by slot
        "${mpi_args[@]}" "${launcher_args[@]}"
    )
    if [[ -n $hosts ]]; then
        flags+=(-H "$hosts")
    elif [[ -z ${SLURM_JOB_ID:-}${PBS_JOBID:-}${LSB_JOBID:-} ]]; then
        flags+=(-H "localhost:$np") # otherwise mpirun refuses to start more ranks than cores
    fi
    wrap_command
    compose_environment
    # Ranks on other hosts have the environment of ssh there, and the variables named here. mpirun sends the values
    # over its own connection, so they are on no command line.
    local variable
    for variable in "${rank_env[@]}"; do flags+=(-x "${variable%%=*}"); done
    run_launcher mpirun "${flags[@]}" "${command[@]}"
}

main "$@"
