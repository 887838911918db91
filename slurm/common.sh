#!/usr/bin/env bash
# What the batch scripts here share. Each finds this repository, names it in HVDQN_HOME, and sources this file.

readonly STOPPED=75                   # hvdqn's exit code: stopped by a signal, after a checkpoint
readonly KILLED_BY_USR2=$((128 + 12)) # the signal came before Python could catch it: nothing was under way yet
readonly KILLED_BY_TERM=$((128 + 15)) # the same; srun ends so whoever still starts when another rank has failed

# What scontrol calls this job. The number of a whole array is also the number of one of its tasks, so a task says
# both: `scontrol requeue 17` would start every task of array 17 again.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
readonly job=${job:-$SLURM_JOB_ID}
readonly ranks=${SLURM_NTASKS:-1} cpus=${SLURM_CPUS_PER_TASK:-1} restarts=${SLURM_RESTART_COUNT:-0}

say() { printf 'hvdqn job %s: %s\n' "$job" "$*"; }

die() { # die MESSAGE: the input is wrong
    say "error: $*" >&2
    exit 2
}

# Read site.env, and set what follows from it and from Slurm.
load_site() {
    local -r site=${HVDQN_SITE_ENV:-$HVDQN_HOME/slurm/site.env}
    if [[ -e $site ]]; then
        set +eu # modules and activate scripts are not written for strict shells
        # shellcheck source=/dev/null
        source "$site"
        set -eu
    elif [[ -n ${HVDQN_SITE_ENV:-} ]]; then
        die "HVDQN_SITE_ENV names $site, which is not there"
    fi
    export OMP_NUM_THREADS=$cpus # ranks of one node share it: a rank has one thread for each core it was given
    export PYTHONUNBUFFERED=1    # output as it comes, into a file too
    count_gpus
}

# Sets `run_dir`, absolute: what the arguments name last. Else there is one folder a job, so that a requeued job finds its
# checkpoints again.
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

# Two ranks on one GPU end inside NCCL, which says little; a GPU without a rank is paid for and idle.
count_gpus() {
    local -r gpus=$((${SLURM_GPUS_ON_NODE:-0} * SLURM_JOB_NUM_NODES))
    ((gpus == 0 || gpus == ranks)) ||
        say "warning: $ranks ranks and $gpus GPUs; one rank a GPU is --ntasks-per-node=$SLURM_GPUS_ON_NODE"
}

# The Python that has torch and Horovod; hvdqn itself as it stands in this repository.
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

# Start a command on every task, wait for all, and return the highest of their exit codes.
run_ranks() { # run_ranks [SRUN_FLAG...] COMMAND [ARGUMENT...]
    local -r flags=(
        --mpi="${HVDQN_MPI:-pmix}" # how ranks find each other; `srun --mpi=list` shows what this Slurm has
        --kill-on-bad-exit=1       # a rank dies: end the others, which would wait for it
        --unbuffered               # output as it comes
        --cpus-per-task="$cpus"    # srun does not take it from sbatch since Slurm 22.05
        --export=ALL               # what site.env has set, also where sbatch was told --export=NONE
    )
    srun "${flags[@]}" "$@" &
    local -r step=$!
    # Slurm signals ranks directly. What reaches this shell alone (--signal=B:..., scancel --batch) goes on to them:
    # srun hands USR2 to every rank. And it must not end this shell, which is to requeue the job.
    # shellcheck disable=SC2064 # the number of this step, now
    trap "kill -USR2 $step 2>/dev/null || true" TERM USR2
    while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done # a trapped signal ends wait, not the ranks
    wait "$step"
}

# What Slurm knows of this job; nothing where its controller, which may be restarting, does not answer.
job_record() {
    for _ in {1..6}; do
        scontrol show job "$job" && return
        sleep 5
    done
}

# End the job with the ranks' exit code; where it says "stopped by a signal", have Slurm start the job again.
finish() { # finish CODE
    local -r most=${HVDQN_MAX_RESTARTS:-20}
    local code=$1 state
    # srun returns the highest code of its ranks: it hides that of the one that failed.
    ((code != KILLED_BY_TERM)) || code=1
    ((code == STOPPED || code == KILLED_BY_USR2)) || exit "$code"

    state=$(job_record)
    if [[ -n $state && $state != *JobState=RUNNING* && $state != *Reason=TimeLimit* ]]; then
        say "stopped because Slurm ends this job (scancel, or a requeue of its own); its run directory is $run_dir"
    # A signal that comes with the start comes with every start. Slurm sends that of --signal up to 60 s early: where
    # --time is at most 300 + 60 s it was that one, unless Slurm wants the nodes for another job, which it notes.
    elif ((SECONDS < 60)) && [[ $state == *TimeLimit=00:0[0-6]:* && $state == *PreemptTime=None* ]]; then
        say "stopped by a signal after $SECONDS s, and not requeued: --time must be well above the 300 s of --signal;" \
            "give --time=0:30:00 or --signal=USR2@60, and --run-dir $run_dir to go on"
    elif ((restarts >= most)); then
        say "stopped by a signal, and not requeued after $restarts restarts (HVDQN_MAX_RESTARTS=$most);" \
            "to go on, submit again with --run-dir $run_dir"
    else
        # Said before: a requeue ends what still runs of the job, this shell and scontrol too, which is no refusal.
        say "stopped by a signal; requeued, restart $((restarts + 1)) of at most $most"
        scontrol requeue "$job" || (($? > 128)) ||
            say "no: Slurm refused to requeue; to go on, submit again with --run-dir $run_dir"
    fi
    exit "$code"
}
