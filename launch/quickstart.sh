#!/usr/bin/env bash
# From a fresh clone to a trained agent: set up the environment, train CartPole on two ranks with Horovod, and print how
# well the agent plays. Training takes about a minute on 2 cores, the first set-up some minutes, later ones a second.
#
#   launch/quickstart.sh                          CartPole; exits with 1 if the mean return is below 475
#   launch/quickstart.sh --seed 3                 flags are passed to `python -m hvdqn.train`
#   launch/quickstart.sh --preset minatar --env MinAtar/Breakout-v1
#
# Without a C++ compiler Horovod cannot be built, and the same job runs under torchrun. The settings of setup.sh
# (HVDQN_PYTHON, HVDQN_VENV, HVDQN_TORCH, HVDQN_SYSTEM_MPI, HVDQN_HOROVOD) apply here too.
#
# Exit code: 0 solved; 1 finished below 475, or failed; else that of setup.sh or hvdqn.train (2: wrong input).
set -euo pipefail

readonly ranks=2
readonly solved=475 # Gymnasium's threshold for CartPole-v1, whose returns go up to 500

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
repo=${here%/*}
venv=${HVDQN_VENV:-$repo/.venv}

# Sets `run_dir`, `min_return` (empty if the user chose another task) and `added`, the flags that the user left out.
read_flags() {
    run_dir=
    min_return=$solved
    local preset=
    while (($#)); do
        case $1 in
            --run[-_]dir) run_dir=${2:-} ;;
            --run[-_]dir=*) run_dir=${1#*=} ;;
            --preset | --preset=*) preset=given min_return= ;;
            --env | --env=* | --config | --config=*) min_return= ;;
        esac
        shift
    done
    added=()
    # On the CPU, where such a small network is fastest. Also, NCCL needs a GPU for each rank.
    [[ -n $preset ]] || added+=(--preset cartpole --device cpu)
    if [[ -z $run_dir ]]; then
        run_dir=$repo/runs/quickstart-$(date +%Y%m%d-%H%M%S)
        added+=(--run-dir "$run_dir")
    fi
}

# MPI rather than Gloo: Gloo crashes if the host's name does not resolve, ends with 1 whatever hvdqn's exit code is, is
# slower for small tensors, and puts the environment on the command line.
launch_with_horovod() {
    local arguments="--mca orte_tag_output 0" # otherwise mpirun puts '[1,0]<stdout>:' into the output
    if ((EUID == 0)); then
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
    if ! command -v ssh >/dev/null; then
        export OMPI_MCA_plm=isolated # otherwise Open MPI needs ssh even for one host
    fi
    # --disable-cache: the cache is one file for all jobs, and saves nothing on one host.
    horovodrun -np "$ranks" --mpi --mpi-args="$arguments" --disable-cache python -m hvdqn.train "$@"
}

# --standalone uses a free port, so that two jobs on one host do not connect to each other.
launch_with_torchrun() {
    export OMP_NUM_THREADS=1 # torchrun would set it with a warning; hvdqn sets torch's threads itself
    torchrun --standalone --nproc-per-node "$ranks" -m hvdqn.train "$@"
}

train() {
    if [[ -f $venv/.hvdqn-horovod ]]; then
        printf '\nTraining on %d ranks with horovodrun. Run directory: %s\n' "$ranks" "$run_dir"
        launch_with_horovod "$@"
    else
        printf '\nTraining on %d ranks with torchrun (Horovod is not installed). Run directory: %s\n' "$ranks" "$run_dir"
        launch_with_torchrun "$@"
    fi
}

# Prints the evaluation and the paths of the results. Sets `code` to 1 if the mean return is below `min_return`.
report() {
    local checkpoints=("$run_dir"/checkpoints/[0-9]*)
    hvdqn plot "$run_dir" -o "$run_dir/curve.png" >/dev/null
    printf '\n'
    python -m hvdqn.launchers.quickstart "$run_dir/summary.json" "$min_return" || code=1
    printf '%-18s %s\n' "Run directory" "$run_dir" "Curve" "$run_dir/curve.png" "Checkpoint" "${checkpoints[-1]}"
    printf '%-18s %d s: set-up %d s, training %d s\n' "Time" "$SECONDS" "$setup_seconds" "$((train_seconds))"
    printf 'Play it again:     hvdqn eval %s\n' "$run_dir"
}

main() {
    case ${1:-} in
        -h | --help)
            sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
            printf '\nFlags of training: python -m hvdqn.train --help\n'
            return
            ;;
    esac
    code=0
    read_flags "$@"
    "$here/setup.sh"
    setup_seconds=$SECONDS
    export PATH=$venv/bin:$PATH
    train "${added[@]}" "$@"
    train_seconds=$((SECONDS - setup_seconds))
    report
    return "$code"
}

main "$@"
