#!/usr/bin/env bash
# From a fresh clone to a trained agent: set up, then train CartPole on two ranks with Horovod, and say how well it plays.
# Training takes about a minute on 2 cores; the first set-up some minutes more, later ones a second.
#
#   launch/quickstart.sh                          CartPole; exits with 1 unless it reaches a mean return of 475
#   launch/quickstart.sh --seed 3                 flags are passed on to `python -m hvdqn.train`
#   launch/quickstart.sh --preset minatar --env MinAtar/Breakout-v1
#
# Where no C++ compiler is found, so that there is no Horovod, the same job runs under torchrun.
# Settings of setup.sh (HVDQN_PYTHON, HVDQN_VENV, HVDQN_TORCH, HVDQN_SYSTEM_MPI, HVDQN_HOROVOD) hold here too.
#
# Exit: 0 solved; 1 finished below 475, or failed; else the code of setup.sh or of hvdqn.train (2: wrong input).
set -euo pipefail

readonly ranks=2
readonly solved=475 # Gymnasium's own threshold of CartPole-v1: a mean return of 475 of at most 500

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
repo=${here%/*}
venv=${HVDQN_VENV:-$repo/.venv}

# What the user's flags leave to this script: the run directory, the preset, whether CartPole's threshold applies.
read_flags() {
    run_dir=
    judged=yes
    local preset=
    while (($#)); do
        case $1 in
            --run[-_]dir) run_dir=${2:-} ;;
            --run[-_]dir=*) run_dir=${1#*=} ;;
            --preset | --preset=*) preset=given judged= ;;
            --env | --env=* | --config | --config=*) judged= ;;
        esac
        shift
    done
    added=()
    # On the CPU, where so small a network is fastest. Also, NCCL takes no two ranks on one GPU.
    [[ -n $preset ]] || added+=(--preset cartpole --device cpu)
    if [[ -z $run_dir ]]; then
        run_dir=$repo/runs/quickstart-$(date +%Y%m%d-%H%M%S)
        added+=(--run-dir "$run_dir")
    fi
}

# MPI rather than Gloo: it runs where the host's name does not resolve (Gloo then crashes), it passes on the exit
# code of hvdqn (Gloo turns each into 1), small allreduces are faster, and the environment stays off the command line.
launch_with_horovod() {
    local arguments="--mca orte_tag_output 0" # without: '[1,0]<stdout>:' before every piece of a line
    if ((EUID == 0)); then
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
    if ! command -v ssh >/dev/null; then
        export OMPI_MCA_plm=isolated # Open MPI wants an ssh even for one host, unless told that there is one only
    fi
    # --disable-cache: what horovodrun remembers for an hour, in one file for all jobs, it finds out here in no time.
    horovodrun -np "$ranks" --mpi --mpi-args="$arguments" --disable-cache python -m hvdqn.train "$@"
}

# --standalone takes a free port, so that two jobs on one host do not meet.
launch_with_torchrun() {
    export OMP_NUM_THREADS=1 # what torchrun sets anyway, with a warning; hvdqn sets torch's threads itself
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

# Prints the evaluation of summary.json and where everything lies; fails where the mean is below the threshold.
report() {
    local checkpoints=("$run_dir"/checkpoints/[0-9]*)
    hvdqn plot "$run_dir" -o "$run_dir/curve.png" >/dev/null
    printf '\n'
    python - "$run_dir/summary.json" "${judged:+$solved}" <<'PY' || code=1
import json
import pathlib
import sys

summary = json.loads(pathlib.Path(sys.argv[1]).read_text())
mean, std, episodes = (summary[f"eval_{name}"] for name in ("return_mean", "return_std", "episodes"))
print(f"Greedy evaluation  mean {mean:.1f}, standard deviation {std:.1f} over {episodes} episodes")
if sys.argv[2] and not mean >= float(sys.argv[2]):
    sys.exit(f"quickstart.sh: a mean return of {mean:.1f} is below {sys.argv[2]}, where {summary['env']} counts as solved")
PY
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
