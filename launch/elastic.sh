#!/usr/bin/env bash
# Train on hosts that come and go, with Horovod's elastic mode (over Gloo, on CPUs).
#
#   launch/elastic.sh --hosts h1:4,h2:4,h3:4 -- --preset minatar --run-dir /shared/runs/breakout
#   launch/elastic.sh --discovery ./free_hosts.sh --max-np 16 -- --preset minatar --run-dir /shared/runs/breakout
#
# When a worker dies, its host is left out for a while, with all workers on it; the ranks on the other hosts go on at
# once, and no update that they finished is lost. When the host is back, or another comes, workers start there and join:
# they get weights and clock, and fill their replay before they contribute. The job ends at --total-env-steps as always.
# If all ranks die while others start, those go on from the newest checkpoint.
#
#   --discovery FILE     a program that prints the hosts there are now, one a line, as in h1:4. It is asked every second
#                        and takes the place of --hosts
#   -np N                ranks to begin with; default: all slots there are at the start
#   --min-np N           with fewer slots than this the job waits for hosts; default: 1. It must leave room for hosts to
#                        fail: Horovod does not replace a worker whose death leaves fewer than N
#   --max-np N           ranks of the largest world, and the parts that --replay-capacity is cut into; default: the ranks
#                        to begin with
#   --cooldown MIN,MAX   seconds that a host is left out when a worker died there: about twice MIN, twice as long each
#                        time it happens again, up to MAX; default: 10,600
#   --join-timeout N     seconds to wait for a worker that starts, imports from slow disks included; default: 60
#
# Two hosts are needed at least, and a run directory that all of them see. A worker that hangs is not replaced: after
# --stall-timeout it is named and the job ended. A host that vanishes without a word is missed after
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
            [[ -f $2 && -x $2 ]] || die 2 "--discovery '$2' is no program; give one that prints hosts, a line each, as h1:4"
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
    [[ $2 =~ ^[1-9][0-9]*$ ]] || die 2 "$1 '$2' is no whole number above 0; give one, as in $1 4"
}

# Sets `hosts` to what discovery finds now.
discover() {
    [[ -z $hosts ]] || die 2 "--hosts and --discovery exclude each other; give one of them"
    local found
    found=$("$discovery") || die 2 "--discovery $discovery failed ($?); it must print hosts, a line each, as h1:4"
    hosts=$(paste -sd, <<<"$found")
    [[ -n $hosts ]] || die 1 "--discovery $discovery finds no host to begin with; start again when there is one"
}

check_sizes() {
    max_np=${max_np:-$np}
    [[ -n $begin_with ]] || ((np <= max_np)) || np=$max_np
    ((min_np <= np && np <= max_np)) ||
        die 2 "--min-np $min_np, -np $np, --max-np $max_np: each must be at least the one before it"
    [[ -n $discovery ]] || ((${#names[@]} > 1)) ||
        die 2 "elastic jobs need two --hosts or more: when a worker dies, its host is left out; for one, launch/horovodrun.sh"
    [[ ${#flags[@]} -eq 0 || ${flags[0]} == -* ]] ||
        die 2 "'${flags[0]}': behind '--' stand flags of training; elastic jobs run nothing else"
}

# horovodrun with three changes. A worker that ends by itself speaks for the job: Horovod would replace it, or make a
# failed job of a finished one in which another worker died last; and what waits in the driver for all workers to answer
# would wait for ever. Its exit code is the job's: 70 (all ranks failed together: see hvdqn/elastic.py) as 1, as
# everywhere. And a worker that dies while it waits for the driver costs no traceback there.
readonly horovodrun='
import contextlib, re, sys, threading
from horovod.runner import gloo_run
from horovod.runner.http.http_server import RendezvousHTTPServer
from horovod.runner.launch import run_commandline

class Driver(gloo_run.ElasticDriver):
    verdict = None

    def _handle_worker_exit(self, slot_info, exit_code, timestamp):
        if exit_code in (0, 2, 70, 75) and Driver.verdict is None:
            Driver.verdict = 1 if exit_code == 70 else exit_code
            self.stop()
        if Driver.verdict is not None:
            self._worker_registry._barrier.abort()
        with contextlib.suppress(threading.BrokenBarrierError):
            super()._handle_worker_exit(slot_info, exit_code, timestamp)

RendezvousHTTPServer.handle_error = lambda *_: None
gloo_run.ElasticDriver = Driver
sys.argv[0] = "horovodrun"
try:
    run_commandline()
    sys.exit(Driver.verdict)
except Exception as error:
    if Driver.verdict is not None:
        sys.exit(Driver.verdict)
    first = re.search(r"Exit code: (\d+)", str(error))
    sys.exit(int(first[1]) if first else f"elastic.sh: error: {error}")
'

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
        "$python" -c "$horovodrun" --gloo -np "$np" --min-np "$min_np" --max-np "$max_np"
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
