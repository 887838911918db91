#!/usr/bin/env bash
# Train on hosts that may join and leave during the run, with Horovod's elastic mode (over Gloo, on CPUs).
#
#   launch/elastic.sh --hosts h1:4,h2:4,h3:4 -- --preset minatar --run-dir /shared/runs/breakout
#   launch/elastic.sh --discovery ./free_hosts.sh --max-np 16 -- --preset minatar --run-dir /shared/runs/breakout
#
# When a worker dies, its host and all workers on it are excluded for a while. The ranks on the other hosts continue at
# once and lose no finished update. When the host returns, or a new one joins, workers start there: they receive weights
# and clock, and fill their replay before they contribute gradients. The job ends at --total-env-steps as always. If all
# ranks die while new workers start, those continue from the newest checkpoint.
#
#   --discovery FILE     a program that prints the available hosts, one per line, as in h1:4. It runs every second and
#                        replaces --hosts
#   -np N                ranks at the start; default: all slots that are available at the start
#   --min-np N           with fewer slots than N the job waits for hosts; default: 1. Leave room for hosts to fail:
#                        Horovod does not replace a worker if fewer than N are left after its death
#   --max-np N           the largest number of ranks, each of which holds 1/N of --replay-capacity; default: the ranks
#                        at the start
#   --cooldown MIN,MAX   seconds for which a host is excluded after a worker died there: about twice MIN, then twice as
#                        long each time, up to MAX; default: 10,600
#   --join-timeout N     seconds to wait for a worker to start, including slow imports; default: 60
#
# The job needs at least two hosts, and a run directory that all of them share. A worker that hangs is not replaced:
# after --stall-timeout hvdqn names it and ends the job. A host that disappears from the network is noticed after
# HOROVOD_GLOO_TIMEOUT_SECONDS (60).
#
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

own_flag() { # own_flag NAME VALUE
    case $1 in
        --min-np) number "$@" && min_np=$2 ;;
        --max-np) number "$@" && max_np=$2 ;;
        --join-timeout) number "$@" && join_timeout=$2 ;;
        --discovery)
            [[ -f $2 && -x $2 ]] || die 2 "--discovery '$2' is not a program; give one that prints hosts, one per line, as h1:4"
            discovery=$(realpath -- "$2")
            ;;
        --cooldown)
            [[ $2 =~ ^([1-9][0-9]*),([1-9][0-9]*)$ ]] || die 2 "--cooldown '$2': give seconds as MIN,MAX, such as 10,600"
            cooldown=("${BASH_REMATCH[@]:1}")
            ((cooldown[0] <= cooldown[1] && cooldown[1] <= 3600)) ||
                die 2 "--cooldown $2: MIN must not be above MAX, nor MAX above 3600"
            ;;
        *) return 0 ;;
    esac
    return 2
}

number() { # number FLAG VALUE
    [[ $2 =~ ^[1-9][0-9]*$ ]] || die 2 "$1 '$2' is not a whole number above 0; give one, as in $1 4"
}

# Sets `hosts` to those that the discovery program prints.
discover() {
    [[ -z $hosts ]] || die 2 "--hosts and --discovery exclude each other; give one of them"
    local found
    found=$("$discovery") || die 2 "--discovery $discovery failed ($?); it must print hosts, one per line, as h1:4"
    hosts=$(paste -sd, <<<"$found")
    [[ -n $hosts ]] || die 1 "--discovery $discovery finds no host to start on; start again when there is one"
}

check_sizes() {
    max_np=${max_np:-$np}
    [[ -n $begin_with ]] || ((np <= max_np)) || np=$max_np
    ((min_np <= np && np <= max_np)) ||
        die 2 "--min-np $min_np, -np $np, --max-np $max_np: each must be at least the one before it"
    [[ -n $discovery ]] || ((${#names[@]} > 1)) ||
        die 2 "elastic jobs need two --hosts or more: a host is excluded when a worker dies there; for one, launch/horovodrun.sh"
    [[ ${#flags[@]} -eq 0 || ${flags[0]} == -* ]] ||
        die 2 "'${flags[0]}': only flags of training may follow '--'; elastic jobs run nothing else"
}

main() {
    min_np=1 max_np='' join_timeout=60 discovery='' cooldown=(10 600)
    parse_flags "$@"
    local flags=("${command[@]}") begin_with=$np
    [[ -z $discovery ]] || discover
    set_up
    check_sizes
    need_module horovod "run launch/install_horovod.sh, or start with launch/torchrun.sh, which is not elastic"
    check_hosts "$python"

    local run=(
        "$python" -m hvdqn.elastic.driver --gloo -np "$np" --min-np "$min_np" --max-np "$max_np"
        --blacklist-cooldown-range "${cooldown[@]}" --disable-cache "${launcher_args[@]}"
    )
    [[ -n $discovery ]] && run+=(--host-discovery-script "$discovery") || run+=(-H "$hosts")
    [[ -z $interfaces ]] || run+=(--network-interfaces "$interfaces")
    command=("$python" -m hvdqn.elastic --max-np "$max_np" --join-timeout "$join_timeout" "${flags[@]}")

    export HOROVOD_START_TIMEOUT=${HOROVOD_START_TIMEOUT:-120}
    export HOROVOD_GLOO_TIMEOUT_SECONDS=${HOROVOD_GLOO_TIMEOUT_SECONDS:-60}
    wrap_command
    compose_environment
    run_launcher "${run[@]}" "${command[@]}"
}

main "$@"
