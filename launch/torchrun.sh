#!/usr/bin/env bash
# Train with torchrun, on this host or on several. It needs neither Horovod nor MPI: gradients are averaged over Gloo,
# on GPUs over NCCL.
#
#   launch/torchrun.sh -np 8 -- --preset atari --env ALE/Breakout-v5
#   launch/torchrun.sh --hosts h1:4,h2:4 --interfaces eth0 -- --preset atari --run-dir /shared/runs/breakout
#
#   --port N    port on the first of --hosts by which the hosts connect; default: a random one from 20000 to 29999
#
# torchrun itself starts ranks on its own host only. This script starts a torchrun on each host, over ssh, and ends all
# of them when one fails.
#
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

own_flag() {
    [[ $1 == --port ]] || return 0
    [[ $2 =~ ^[1-9][0-9]{0,4}$ ]] || die 2 "--port '$2' is not a port; give one that is free on the first host"
    port=$2
    return 2
}

# How long the other hosts may run on after one has failed: their ranks notice the lost connection and end by
# themselves.
readonly grace_seconds=30

# Removes hosts from `names` that get no rank because of -np. The other hosts would wait for them forever.
drop_idle_hosts() {
    local busy=0 left=$np
    while ((left > 0 && busy < ${#names[@]})); do
        left=$((left - slots[busy]))
        busy=$((busy + 1))
    done
    names=("${names[@]:0:busy}")
    find_remote_hosts
}

# Starts torchrun on one host, this one or over ssh. Over ssh it ends when its input ends, that is, with this script.
start_on() { # start_on HOST RANKS NODE
    local words=(env -i "${rank_env[@]}" "$python" -m hvdqn.launchers.torchrun "${launcher_args[@]}"
        --nnodes "${#names[@]}" --node-rank "$3" --nproc-per-node "$2"
        --master-addr "${names[0]}" --master-port "$port" --no-python "${command[@]}")
    if [[ " ${remote[*]} " != *" $1 "* ]]; then
        "${words[@]}" {alive}>&- &
    else
        local line='' word
        for word in "${words[@]}"; do line+=" $(quote "$word")"; done
        # shellcheck disable=SC2016 # expanded by the remote shell
        line="cd $(quote "$PWD") && exec sh -c $(quote '"$@" </dev/null & job=$!
{ cat >/dev/null; kill "$job"; } <&3 & watch=$!
wait "$job"; code=$?; kill "$watch"; exit "$code"') torchrun $line 3<&0"
        # shellcheck disable=SC2029 # quoted for the remote shell
        ssh "${ssh_options[@]}" "$1" "$line" <"$scratch/alive" {alive}>&- &
    fi
    launched+=("$!")
}

start_on_hosts() {
    mkfifo "$scratch/alive"
    exec {alive}<>"$scratch/alive" # open until this script ends, even if it is killed
    launched=() stops=0
    trap forward_stop TERM USR2 INT
    local node left=$np ranks
    for ((node = 0; node < ${#names[@]}; node++)); do
        ranks=$((left < slots[node] ? left : slots[node]))
        start_on "${names[node]}" "$ranks" "$node"
        left=$((left - ranks))
    done
}

# Waits for all hosts and exits with the code of the first that failed. The others then get `grace_seconds` to end.
wait_for_hosts() {
    local running=("${launched[@]}") failed=0 deadline=0 ended=0 i
    while ((${#running[@]})); do
        sleep 0.2
        for i in "${!running[@]}"; do
            ! kill -0 "${running[i]}" 2>/dev/null || continue
            wait_for "${running[i]}"
            unset "running[i]"
            if ((code == 255)); then
                printf '%s: error: lost the connection to host %s\n' "$me" "${names[i]}" >&2
                code=1
            fi
            # The code of a killed rank (> 128) is the cause; ranks that lost their connection to it exit with 1.
            if ((code && !failed)) || ((code > 128 && failed == 1 && !ended)); then
                failed=$code
            fi
            ((!failed || deadline)) || deadline=$((SECONDS + grace_seconds))
        done
        if ((failed && SECONDS > deadline && !ended && ${#running[@]})); then
            ended=1 # only once: after a second signal torchrun would leave its ranks behind
            kill -TERM "${running[@]}" 2>/dev/null || true
        fi
    done
    exit "$failed"
}

main() {
    port=$((20000 + RANDOM % 10000))
    prepare "$@"
    drop_idle_hosts
    if ((${#remote[@]})) && [[ ${names[0]} == localhost || ${names[0]} == 127.* ]]; then
        die 2 "--hosts: the others cannot find the first one as '${names[0]}'; give the name by which they know it"
    fi
    need_module torch "run launch/setup.sh"
    check_hosts "$python"
    wrap_command
    command=("${command[@]//\$/\$\$}") # torchrun replaces ${local_rank} and $$ in arguments
    if [[ -n $interfaces ]]; then
        export GLOO_SOCKET_IFNAME=$interfaces NCCL_SOCKET_IFNAME=$interfaces
    fi
    compose_environment
    if ((${#remote[@]})); then
        start_on_hosts
        wait_for_hosts
    else
        # --standalone uses a free port, so that two jobs on one host do not connect to each other.
        run_launcher "$python" -m hvdqn.launchers.torchrun "${launcher_args[@]}" --standalone --nproc-per-node "$np" \
            --no-python "${command[@]}"
    fi
}

main "$@"
