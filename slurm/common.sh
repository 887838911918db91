#!/usr/bin/env bash
# Functions for the batch scripts in this folder, which find this repository (HVDQN_HOME) and source this file.

readonly STOPPED=75                   # hvdqn's exit code: stopped by a signal, after a checkpoint
readonly KILLED_BY_USR2=$((128 + 12)) # the signal came before Python could catch it, so there is nothing to save
readonly KILLED_BY_TERM=$((128 + 15)) # as above; srun also ends ranks in this way if another one fails

# The name of this job for scontrol. A task of an array needs the form ARRAY_TASK: `scontrol requeue 17` would requeue
# every task of array 17.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
readonly job=${job:-$SLURM_JOB_ID}
readonly ranks=${SLURM_NTASKS:-1} cpus=${SLURM_CPUS_PER_TASK:-1} restarts=${SLURM_RESTART_COUNT:-0}

info() { printf 'hvdqn job %s: %s\n' "$job" "$*"; }

die() { # die MESSAGE: for wrong input
    info "error: $*" >&2
    exit 2
}

# Sources site.env and sets the environment of the ranks.
load_site() {
    local -r site=${HVDQN_SITE_ENV:-$HVDQN_HOME/slurm/site.env}
    if [[ -e $site ]]; then
        set +eu # modules and activate scripts may fail under -eu
        # shellcheck source=/dev/null
        source "$site"
        set -eu
    elif [[ -n ${HVDQN_SITE_ENV:-} ]]; then
        die "HVDQN_SITE_ENV names $site, which is not there"
    fi
    export OMP_NUM_THREADS=$cpus # one thread for each core of a rank
    export PYTHONUNBUFFERED=1    # write output at once, also to a file
    export TERM=dumb             # `srun --unbuffered` gives ranks a terminal, but their output ends in a file
    check_gpus
}

# Sets `run_dir` to the absolute path of the last --run-dir in the arguments. The default contains the job id, so that a
# requeued job finds its checkpoints.
choose_run_dir() { # choose_run_dir ARGUMENT...
    run_dir=
    while (($#)); do
        case $1 in
            --run[-_]dir) run_dir=${2:-} ;;
            --run[-_]dir=*) run_dir=${1#*=} ;;
        esac
        shift
    done
    run_dir=${run_dir:-${HVDQN_RUNS:-runs}/$job}
    [[ $run_dir == /* ]] || run_dir=$PWD/$run_dir
}

# Warns if there is not one rank per GPU. Two ranks on one GPU fail in NCCL with an unclear message; a GPU without a
# rank is idle.
check_gpus() {
    local -r gpus=$((${SLURM_GPUS_ON_NODE:-0} * SLURM_JOB_NUM_NODES))
    ((gpus == 0 || gpus == ranks)) ||
        info "warning: $ranks ranks and $gpus GPUs; for one rank per GPU use --ntasks-per-node=$SLURM_GPUS_ON_NODE"
}

# Puts the environment with torch and Horovod into PATH, and this repository's hvdqn into PYTHONPATH.
load_python() {
    local -r venv=${HVDQN_VENV:-$HVDQN_HOME/.venv}
    if [[ -x $venv/bin/python ]]; then
        PATH=$venv/bin:$PATH
    elif [[ -n ${HVDQN_VENV:-} ]]; then
        die "HVDQN_VENV names $venv, which has no bin/python; correct it in site.env"
    fi
    export PATH PYTHONPATH=$HVDQN_HOME${PYTHONPATH:+:$PYTHONPATH}
    python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))' ||
        die "$(command -v python || echo 'there is no python, which') has no torch; run launch/setup.sh, or name" \
            "an environment that has it: HVDQN_VENV in site.env, from site.env.example"
}

# Sets `srun_flags`, with which srun starts ranks.
set_srun_flags() {
    srun_flags=(
        --mpi="${HVDQN_MPI:-pmix}" # how ranks find each other; `srun --mpi=list` shows the choices
        --kill-on-bad-exit=1       # when a rank dies, end the others, which would wait for it
        --unbuffered               # write output at once
        --cpus-per-task="$cpus"    # since Slurm 22.05 srun does not inherit it from sbatch
        --export=ALL               # pass on what site.env has set, even under sbatch --export=NONE
    )
}

# Runs a command on every task and returns the highest of their exit codes.
run_ranks() { # run_ranks [SRUN_FLAG...] COMMAND [ARGUMENT...]
    set_srun_flags
    earlier_summary=$(summary)
    run_and_forward srun "${srun_flags[@]}" "$@"
}

# Runs a program, passes signals on to it, and returns its exit code.
run_and_forward() { # run_and_forward PROGRAM [ARGUMENT...]
    "$@" &
    local -r step=$!
    # Slurm signals the ranks directly. Signals to this shell alone (--signal=B:..., scancel --batch) are passed on, and
    # srun sends USR2 to every rank. They must not end this shell, which has to requeue the job.
    # shellcheck disable=SC2064 # expand the step's process id now
    trap "kill -USR2 $step 2>/dev/null || true" TERM USR2
    while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done # a trapped signal interrupts `wait`
    wait "$step"
}

# Prints summary.json of the run directory, or nothing.
summary() { cat -- "$run_dir/summary.json" 2>/dev/null || true; }

# Succeeds if the ranks of this start recorded that they stopped after a checkpoint. An earlier start may have left a
# summary.
stopped_after_checkpoint() {
    local -r now=$(summary)
    [[ $now == *'"stopped_by": "signal"'* && $now != "$earlier_summary" ]]
}

# Prints Slurm's record of this job, or nothing if the controller does not answer, for example while it restarts.
job_record() {
    for _ in {1..6}; do
        scontrol show job "$job" && return
        sleep 5
    done
}

# Ends the job with the exit code of the ranks. Requeues it if they recorded that they stopped after a checkpoint, or if
# Slurm says that it preempted the job or that the time is over: exit codes alone may be those of a step that Slurm
# could not launch.
finish() { # finish CODE
    local -r most=${HVDQN_MAX_RESTARTS:-20}
    local code=$1 state
    # srun returns the highest code of its ranks, which here hides that of the one that failed.
    ((code != KILLED_BY_TERM)) || code=1
    ((code == STOPPED || code == KILLED_BY_USR2)) || exit "$code"

    state=$(job_record)
    if [[ -n $state && $state != *JobState=RUNNING* && $state != *Reason=TimeLimit* ]]; then
        info "stopped because Slurm ends this job (scancel, or a requeue of its own); its run directory is $run_dir"
    elif ! stopped_after_checkpoint && [[ ! $state =~ Reason=TimeLimit|PreemptTime=[0-9] ]]; then
        info "error: srun ended with $code after $SECONDS s, and no rank recorded that it stopped after a checkpoint;" \
            "not requeued: see above why; to try again, submit again with --run-dir $run_dir" >&2
        ((code != STOPPED)) || code=1
    # Do not requeue a job that the signal of --signal stops right at the start: it would stop every time. Slurm sends
    # that signal up to 60 s early, so a stop within 60 s is due to it if --time is at most 300 + 60 s. The exception is
    # that Slurm needs the nodes for another job, which shows in PreemptTime.
    elif ((SECONDS < 60)) && [[ $state == *TimeLimit=00:0[0-6]:* && $state == *PreemptTime=None* ]]; then
        info "stopped by a signal after $SECONDS s, and not requeued: --time must be well above the 300 s of --signal;" \
            "give --time=0:30:00 or --signal=USR2@60, and --run-dir $run_dir to go on"
    elif ((restarts >= most)); then
        info "stopped by a signal, and not requeued after $restarts restarts (HVDQN_MAX_RESTARTS=$most);" \
            "to go on, submit again with --run-dir $run_dir"
    else
        # Printed first, because the requeue also ends this shell and scontrol: a killed scontrol (> 128) succeeded.
        info "stopped by a signal; requeued, restart $((restarts + 1)) of at most $most"
        scontrol requeue "$job" || (($? > 128)) ||
            info "no: Slurm refused to requeue; to go on, submit again with --run-dir $run_dir"
    fi
    exit "$code"
}
