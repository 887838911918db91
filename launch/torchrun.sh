#!/usr/bin/env bash
# Train with torchrun, on this host or on several. No Horovod and no MPI are needed: gradients travel over torch's Gloo,
# or over NCCL on GPUs.
#
#   launch/torchrun.sh -np 8 -- --preset atari --env ALE/Breakout-v5
#   launch/torchrun.sh --hosts h1:4,h2:4 --interfaces eth0 -- --preset atari --run-dir /shared/runs/breakout
#
#   --port N    where the hosts meet, on the first of --hosts; default: a random one from 20000 to 29999
#
# torchrun itself knows only its own host. This starts one on each, over ssh, and ends them all when one fails.
#
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

own_flag() {
    [[ $1 == --port ]] || return 0
    [[ $2 =~ ^[1-9][0-9]{0,4}$ ]] || die 2 "--port '$2' is no port; give one that is free on the first host"
    port=$2
    return 2
}

# torchrun ends every failed job with a long report and 1. This says in one line what happened, with the rank's own code.
readonly torchrun='
import logging, socket, sys
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
try:
    main(sys.argv[1:])
except SignalException as error:
    sys.exit(128 + error.sigval)
except ChildFailedError as error:
    # Ranks that miss a killed one fail in the same moment: what was killed (a code below 0) tells more.
    rank, failure = min(error.failures.items(), key=lambda item: (item[1].exitcode >= 0, item[1].timestamp))
    code = failure.exitcode
    code = code if code >= 0 else 128 - code
    if code not in (2, 75):  # of those hvdqn has said all
        print(f"torchrun.sh: rank {rank} on {socket.gethostname()} ended with {code}", file=sys.stderr)
    sys.exit(code)
'

# How long the torchruns of other hosts may go on after one has failed: their ranks notice by their broken connections.
readonly grace_seconds=30

# Leaves the hosts out of `names` that -np has no rank for: the others would wait for them for ever.
leave_out_idle_hosts() {
    local busy=0 left=$np
    while ((left > 0 && busy < ${#names[@]})); do
        left=$((left - slots[busy]))
        busy=$((busy + 1))
    done
    names=("${names[@]:0:busy}")
    find_remote_hosts
}

# Starts the torchrun of one host, here or over ssh. There it ends when its input does: when this script is gone.
start_on() { # start_on HOST RANKS NODE
    local words=(env -i "${rank_env[@]}" "$python" -c "$torchrun" "${launcher_args[@]}"
        --nnodes "${#names[@]}" --node-rank "$3" --nproc-per-node "$2"
        --master-addr "${names[0]}" --master-port "$port" --no-python "${command[@]}")
    if [[ " ${remote[*]} " != *" $1 "* ]]; then
        "${words[@]}" {alive}>&- &
    else
        local line='' word
        for word in "${words[@]}"; do line+=" $(quote "$word")"; done
        # shellcheck disable=SC2016 # expanded there
        line="cd $(quote "$PWD") && exec sh -c $(quote '"$@" </dev/null & job=$!
{ cat >/dev/null; kill "$job"; } <&3 & watch=$!
wait "$job"; code=$?; kill "$watch"; exit "$code"') torchrun $line 3<&0"
        # shellcheck disable=SC2029 # quoted for the other side
        ssh "${ssh_options[@]}" "$1" "$line" <"$scratch/alive" {alive}>&- &
    fi
    launched+=("$!")
}

start_on_hosts() {
    mkfifo "$scratch/alive"
    exec {alive}<>"$scratch/alive" # open until this script ends, by whatever
    launched=() stops=0
    trap pass_stop TERM USR2 INT
    local node left=$np ranks
    for ((node = 0; node < ${#names[@]}; node++)); do
        ranks=$((left < slots[node] ? left : slots[node]))
        start_on "${names[node]}" "$ranks" "$node"
        left=$((left - ranks))
    done
}

# The code of the first torchrun to fail; the others then have a while to end.
await_hosts() {
    local running=("${launched[@]}") failed=0 deadline=0 ended=0 i
    while ((${#running[@]})); do
        sleep 0.2
        for i in "${!running[@]}"; do
            ! kill -0 "${running[i]}" 2>/dev/null || continue
            await "${running[i]}"
            unset "running[i]"
            if ((code == 255)); then
                printf '%s: error: lost the connection to host %s\n' "$me" "${names[i]}" >&2
                code=1
            fi
            # A killed rank (> 128) tells more than those that miss it (1).
            if ((code && !failed)) || ((code > 128 && failed == 1 && !ended)); then
                failed=$code
            fi
            ((!failed || deadline)) || deadline=$((SECONDS + grace_seconds))
        done
        if ((failed && SECONDS > deadline && !ended && ${#running[@]})); then
            ended=1 # once: at a second one torchrun would leave its ranks behind
            kill -TERM "${running[@]}" 2>/dev/null || true
        fi
    done
    exit "$failed"
}

main() {
    port=$((20000 + RANDOM % 10000))
    prepare "$@"
    leave_out_idle_hosts
    if ((${#remote[@]})) && [[ ${names[0]} == localhost || ${names[0]} == 127.* ]]; then
        die 2 "--hosts: the others cannot find the first one as '${names[0]}'; give the name that it has for them"
    fi
    need_module torch "run launch/setup.sh"
    check_hosts "$python"
    wrap_command
    command=("${command[@]//\$/\$\$}") # torchrun replaces ${local_rank} in arguments, and $$ by $
    if [[ -n $interfaces ]]; then
        export GLOO_SOCKET_IFNAME=$interfaces NCCL_SOCKET_IFNAME=$interfaces
    fi
    compose_environment
    if ((${#remote[@]})); then
        start_on_hosts
        await_hosts
    else
        # --standalone takes a free port, so that two jobs on one host do not meet.
        run_launcher "$python" -c "$torchrun" "${launcher_args[@]}" --standalone --nproc-per-node "$np" --no-python "${command[@]}"
    fi
}

main "$@"
