# shellcheck shell=bash disable=SC2034
# What horovodrun.sh, mpirun.sh, torchrun.sh and elastic.sh share. They source it; the comment below ends their --help.
#
# Flags:
#   -np N                   ranks; default: all slots of --hosts
#   --hosts h1:4,h2:4       hosts, and how many ranks each may hold (mostly one a GPU; without a number, one). hvdqn and
#                           its environment lie at the same path on all of them. Default: N ranks on this host
#   --interfaces eth0       the network interfaces, separated by commas, by which the hosts reach each other. Name them
#                           where a host has more than one network (docker0 counts): launchers guess, and wrongly guessed
#                           is a job that hangs
#   -x NAME                 let the ranks see this variable too. May be repeated
#   --env-file FILE         each rank's shell sources FILE before Python starts: the way for secrets, see below
#   --launcher-args "..."   words to add to the launcher's own command line
#   --                      flags of `python -m hvdqn.train` follow, or a whole command, as in `-- python -m hvdqn bench`
#
# Environment of the ranks: launchers put variables on command lines, where `ps` shows them to everyone on every host.
# So ranks see only what they need (PATH, HOME, LANG, LD_LIBRARY_PATH, PYTHON*, CUDA_*, NCCL_*, OMP_*, HVDQN_*, HOROVOD_*,
# OMPI_*, UCX_*, SLURM_*, ...: `passed` in launch/common.sh) and what -x names, and nothing that is named like a secret.
# A key or token belongs into a file that only you can read (chmod 600), on a file system that all hosts share:
#
#   echo WANDB_API_KEY=... >~/.hvdqn.env; chmod 600 ~/.hvdqn.env      then --env-file ~/.hvdqn.env
#
# ssh: hosts must let you in without a password. Ports, users and keys belong into ~/.ssh/config. SSH_AUTH_SOCK is passed.
# HVDQN_VENV: the environment that runs hvdqn; default: .venv of this repository, else the Python of PATH.
#
# A stop (SIGTERM, SIGUSR2 or Ctrl-C to this script) reaches the ranks on this host, and through them all: they write a
# checkpoint and exit with 75. A second one ends the job at once.
#
# Exit: the code of hvdqn, which some launchers lose: 0 finished, 2 wrong input, 75 stopped by a signal after a
# checkpoint, 1 failed (also: a host cannot be reached); 128 + n where a rank was killed by signal n.
# End of the help.

readonly me=${0##*/}
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
repo=${here%/*}

# Names of the variables that ranks may see, and the names that no command line may hold.
readonly passed='PATH|HOME|USER|LOGNAME|SHELL|LANG|LC_.*|TZ|TERM|COLUMNS|TMPDIR|XDG_CACHE_HOME|SSH_AUTH_SOCK|KRB5CCNAME'
readonly passed_too='LD_LIBRARY_PATH|PYTHON.*|VIRTUAL_ENV|CONDA_PREFIX|(CUDA|NVIDIA|OMP|MKL|OPENBLAS)_.*'
readonly passed_also='(HVDQN|HOROVOD|NCCL|GLOO|TORCH|PYTORCH|TORCHELASTIC|OMPI|OPAL|PMIX|PRTE|UCX|FI|SLURM|PBS|LSB)_.*'
readonly secret='KEY|TOKEN|SECRET|PASSW|CREDENTIAL|JWT'
is_secret() { [[ ${1^^} =~ $secret && $1 != *_IB_PKEY ]]; } # a partition of InfiniBand is none

# BatchMode: a host that asks for a password is an error now, not a prompt that nobody sees.
readonly ssh_options=(-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=3)

die() { # die CODE MESSAGE
    printf '%s: error: %s\n' "$me" "$2" >&2
    exit "$1"
}

show_help() {
    local file
    for file in "$0" "${BASH_SOURCE[0]}"; do
        sed -n '2,/^\(set \|# End of the help\)/{/^# End/d;/^# shellcheck/d;/^#/s/^# \{0,1\}//p}' "$file"
    done
    exit 0
}

# Reads the flags. A script's own are read by its `own_flag NAME VALUE`: it returns how many words it took, 0 for none.
parse_flags() {
    np='' hosts='' interfaces='' env_file=''
    exported=() launcher_args=() command=()
    local taken
    while (($#)); do
        case $1 in
            -h | --help) show_help ;;
            --) shift && command=("$@") && return ;;
            -np | --hosts | --interfaces | -x | --env-file | --launcher-args)
                (($# > 1)) || die 2 "$1 wants a value; see $me --help"
                read_flag "$1" "$2"
                taken=2
                ;;
            *)
                taken=0
                own_flag "$1" "${2:-}" || taken=$?
                ((taken)) || die 2 "unknown argument '$1'; flags of training go behind '--'; see $me --help"
                ;;
        esac
        shift "$taken"
    done
}

read_flag() { # read_flag NAME VALUE
    case $1 in
        -np)
            [[ $2 =~ ^[1-9][0-9]*$ ]] || die 2 "-np '$2' is no number of ranks; give one, as in -np 8"
            np=$2
            ;;
        --hosts) hosts=$2 ;;
        --interfaces) interfaces=$2 ;;
        -x)
            [[ -n ${!2+set} ]] || die 2 "-x $2: there is no such variable; export it first"
            ! is_secret "$2" ||
                die 2 "-x $2 would show a secret in ps on every host; put it into a file and name that with --env-file"
            exported+=("$2")
            ;;
        --env-file)
            [[ -r $2 ]] || die 2 "--env-file $2 cannot be read; give a file with lines NAME=VALUE"
            env_file=$(realpath -- "$2")
            ;;
        --launcher-args) read -ra launcher_args <<<"$2" ;;
    esac
}

# Sets `names` and `slots`, one entry a host, and `np`.
read_hosts() {
    names=() slots=()
    local host total=0 list
    IFS=, read -ra list <<<"$hosts"
    for host in "${list[@]}"; do
        [[ $host =~ ^[A-Za-z0-9._-]+(:[1-9][0-9]*)?$ ]] || die 2 "--hosts: '$host' is no host; write them as h1:4,h2:4"
        names+=("${host%:*}")
        [[ $host == *:* ]] && slots+=("${host#*:}") || slots+=(1)
        total=$((total + slots[-1]))
    done
    ((${#names[@]})) || total=${np:-0}
    ((total)) || die 2 "how many ranks? Give -np N, or --hosts h1:4,h2:4"
    np=${np:-$total}
    ((np <= total)) ||
        die 2 "-np $np is more than the $total slots of --hosts $hosts; ask for fewer ranks, or give hosts more slots (h1:$np)"
    hosts=
    for ((i = 0; i < ${#names[@]}; i++)); do hosts+=${hosts:+,}${names[i]}:${slots[i]}; done
}

find_python() {
    local venv=${HVDQN_VENV:-$repo/.venv}
    if [[ -n ${HVDQN_VENV:-} || -x $venv/bin/python ]]; then
        python=$venv/bin/python
        [[ -x $python ]] || die 2 "no Python at $python; run launch/setup.sh, or set HVDQN_VENV to another environment"
        venv=$(cd -- "$venv" && pwd) # absolute: it is named on other hosts
        python=$venv/bin/python
        export PATH=$venv/bin:$PATH
    else
        python=$(command -v python3) || die 2 "no .venv in $repo and no python3 in PATH; run launch/setup.sh"
    fi
    if [[ ${#command[@]} -eq 0 || ${command[0]} == -* ]]; then
        command=("$python" -m hvdqn.train "${command[@]}")
    fi
}

need_module() { # need_module MODULE REMEDY
    "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" ||
        die 2 "$1 is not installed for $python; $2"
}

# Sets `remote`: those of `names` that are not this host. A host is this one where its address can be bound to.
find_remote_hosts() {
    remote=()
    ((${#names[@]})) || return 0
    local found
    found=$("$python" - "${names[@]}" <<'PY'
import socket
import sys

for name in sys.argv[1:]:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((name, 0))
    except OSError:
        print(name)
PY
    )
    [[ -z $found ]] || mapfile -t remote <<<"$found"
}

# Ask all remote hosts at once whether they are there and have what this host has. Launchers would find out too, but one
# after the other, after minutes, or without saying which host it was.
check_hosts() { # check_hosts PROGRAM...: which must lie on every host
    local host file wants
    wants="cd $(quote "$PWD")"
    for file; do wants+=" && test -x $(quote "$file")"; done
    local -A asked=()
    for host in "${remote[@]}"; do
        # shellcheck disable=SC2029 # quoted for the other side
        ssh "${ssh_options[@]}" "$host" "$wants" 2>"$scratch/ssh-$host" &
        asked[$host]=$!
    done
    local code failed=0
    for host in "${remote[@]}"; do
        code=0
        wait "${asked[$host]}" || code=$?
        if ((code == 255)); then
            printf '%s: error: cannot reach host %s by ssh: %s\n' "$me" "$host" "$(tail -n 1 "$scratch/ssh-$host" | tr -d '\r')" >&2
            failed=1
        elif ((code)); then
            printf '%s: error: host %s lacks some of what this host has: the folder %s and %s; share the file system, or copy it there\n' \
                "$me" "$host" "$PWD" "$*" >&2
            ((failed)) || failed=2
        fi
    done
    ((failed == 0)) || exit "$failed"
}

quote() { # for the shell of another host, which may not be bash
    printf "'%s'" "${1//\'/\'\\\'\'}"
}

# Sets `rank_env`: NAME=VALUE of all that ranks see. The launcher runs under `env -i` with it.
compose_environment() {
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # of NumPy, and of torch until hvdqn shares out the cores itself
    [[ -t 1 ]] || export TERM=dumb               # launchers give ranks a terminal whatever their own output is
    rank_env=()
    local name
    while read -r name; do
        if [[ $name =~ ^($passed|$passed_too|$passed_also)$ ]] && ! is_secret "$name"; then
            rank_env+=("$name=${!name}")
        fi
    done < <(compgen -e)
    for name in "${exported[@]}"; do rank_env+=("$name=${!name}"); done
}

# Every rank starts as this line: it leaves its process id where `pass_stop` of this host finds it, sources the file with
# the secrets, and becomes the command.
wrap_command() {
    # shellcheck disable=SC2016 # expanded by the rank
    local -r start='pids=$1 file=$2; shift 2
[ ! -d "$pids" ] || : >"$pids/$(uname -n):$$"
if [ -n "$file" ]; then
    [ -r "$file" ] || { echo "hvdqn: error: no file $file on host $(uname -n), which --env-file names" >&2; exit 2; }
    set -a; . "$file"; set +a
fi
exec "$@"'
    mkdir "$scratch/ranks"
    command=(sh -c "$start" rank "$scratch/ranks" "$env_file" "${command[@]}")
}

pass_stop() {
    interrupted=1
    stops=$((stops + 1))
    local ranks=("$scratch/ranks/$(uname -n)":*) # TMPDIR may be shared by hosts
    if ((stops > 1)) || [[ ! -e ${ranks[0]} ]]; then
        ((stops > 1)) || printf '%s: no rank on this host to stop by a checkpoint: ending the job\n' "$me" >&2
        kill -TERM "${launched[@]}" 2>/dev/null || true
    else
        printf '%s: stopping: the ranks write a checkpoint\n' "$me" >&2
        kill -USR2 "${ranks[@]##*:}" 2>/dev/null || true
    fi
}

# Sets `code` to a child's exit code, however often a signal interrupts the waiting.
await() { # await PID
    interrupted=1
    while ((interrupted)); do
        interrupted=0
        code=0
        wait "$1" || code=$?
    done
}

# Runs the launcher in the background, where signals meant for it come to this script.
run_launcher() { # run_launcher COMMAND...
    launched=() stops=0
    trap pass_stop TERM USR2 INT
    env -i "${rank_env[@]}" "$@" &
    launched=("$!")
    await "$!"
    exit "$code"
}

# Sets `mpi_args`, and Open MPI's own variables where the user has not: they reach the ranks' hosts with the environment.
mpi_settings() {
    local mpirun
    mpirun=$(command -v mpirun) ||
        die 2 "no mpirun in PATH; run launch/setup.sh, load your site's MPI module, or start with launch/torchrun.sh"
    [[ $(mpirun --version 2>&1) == *"Open MPI"* ]] ||
        die 2 "$mpirun is not Open MPI's, whose flags this script uses; start hvdqn with your MPI's own mpiexec"
    check_hosts "$python" "$mpirun"

    # Where mpirun finds its daemon on the other hosts: ssh there has none of this shell's PATH and LD_LIBRARY_PATH.
    mpi_args=(--prefix "$(dirname -- "$(dirname -- "$mpirun")")")
    : "${OMPI_MCA_plm_rsh_args:=${ssh_options[*]}}"
    # Two connections: btl carries the tensors, oob the daemons' messages.
    [[ -z $interfaces ]] || : "${OMPI_MCA_btl_tcp_if_include:=$interfaces}" "${OMPI_MCA_oob_tcp_if_include:=$interfaces}"
    # The refusal to run as root is meant for people at a prompt; in a container there is often nobody else.
    ((EUID)) || : "${OMPI_ALLOW_RUN_AS_ROOT:=1}" "${OMPI_ALLOW_RUN_AS_ROOT_CONFIRM:=1}"
    export "${!OMPI_@}"
}

prepare() { # prepare FLAGS...
    parse_flags "$@"
    set_up
}

set_up() {
    read_hosts
    find_python
    scratch=$(mktemp -d "${TMPDIR:-/tmp}/hvdqn-launch.XXXXXX")
    trap 'rm -rf -- "$scratch"' EXIT
    find_remote_hosts
}
