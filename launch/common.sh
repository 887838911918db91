# shellcheck shell=bash disable=SC2034
# Sourced by horovodrun.sh, mpirun.sh, torchrun.sh and elastic.sh. The text from "Flags:" on ends their --help.
#
# Flags:
#   -np N                   number of ranks; default: all slots of --hosts
#   --hosts h1:4,h2:4       hosts, and how many ranks each may run (usually one per GPU; 1 if there is no number). hvdqn
#                           and its environment must be at the same path on all of them. Default: N ranks on this host
#   --interfaces eth0       network interfaces by which the hosts reach each other, separated by commas. Set it if a
#                           host has more than one (docker0 counts): launchers guess, and a wrong guess makes the job hang
#   -x NAME                 pass this variable to the ranks as well. May be repeated
#   --env-file FILE         each rank's shell sources FILE before Python starts. Use it for secrets, see below
#   --launcher-args "..."   arguments to add to the launcher's own command line
#   --                      then flags of `python -m hvdqn.train`, or a whole command, as in `-- python -m hvdqn bench`
#
# Environment of the ranks: launchers put variables on command lines, where `ps` shows them to everyone on every host.
# Therefore ranks get only the variables that they need (PATH, HOME, LANG, LD_LIBRARY_PATH, PYTHON*, CUDA_*, NCCL_*,
# OMP_*, HVDQN_*, HOROVOD_*, OMPI_*, UCX_*, SLURM_*, ...) and those named by -x, and none whose name looks like a
# secret. Put a key or token into a file that only you can read, on a file system that all hosts share:
#
#   echo WANDB_API_KEY=... >~/.hvdqn.env; chmod 600 ~/.hvdqn.env      then --env-file ~/.hvdqn.env
#
# ssh: hosts must accept your login without a password. Set ports, users and keys in ~/.ssh/config. Ranks get
# SSH_AUTH_SOCK.
#
# HVDQN_VENV: the environment that contains hvdqn; default: .venv of this repository, else the Python of PATH.
#
# Stop: send SIGTERM, SIGUSR2 or Ctrl-C to this script. It signals the ranks on this host, and through them all ranks
# stop: they write a checkpoint and exit with 75. A second signal ends the job at once.
#
# Exit code: that of hvdqn, even where the launcher itself would lose it: 0 finished; 2 wrong input; 75 stopped by a
# signal after a checkpoint; 1 failed, for example because a host cannot be reached; 128 + n if signal n killed a rank.
# End of the help.

readonly me=${0##*/}
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
repo=${here%/*}
[[ -d $repo/hvdqn ]] || repo=${repo%/*} # installed from a wheel, this file is in hvdqn/scripts

# Patterns for the names of variables that ranks get, and for names that must not appear on any command line.
readonly passed_user='PATH|HOME|USER|LOGNAME|SHELL|LANG|LC_.*|TZ|TERM|COLUMNS|TMPDIR|XDG_CACHE_HOME|SSH_AUTH_SOCK|KRB5CCNAME'
readonly passed_python='LD_LIBRARY_PATH|PYTHON.*|VIRTUAL_ENV|CONDA_PREFIX|(CUDA|NVIDIA|OMP|MKL|OPENBLAS)_.*'
readonly passed_job='(HVDQN|HOROVOD|NCCL|GLOO|TORCH|PYTORCH|TORCHELASTIC|OMPI|OPAL|PMIX|PRTE|UCX|FI|SLURM|PBS|LSB)_.*'
readonly secret='KEY|TOKEN|SECRET|PASSW|CREDENTIAL|JWT'
is_secret() { [[ ${1^^} =~ $secret && $1 != *_IB_PKEY ]]; } # *_IB_PKEY is a partition of InfiniBand, not a secret

# BatchMode: a host that asks for a password is an error, not a prompt that nobody sees.
readonly ssh_options=(-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=3)

die() { # die CODE MESSAGE
    printf '%s: error: %s\n' "$me" "$2" >&2
    exit "$1"
}

# Prints the comment at the top of the script, then the flags that all scripts share.
show_help() {
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
    sed -n '/^# Flags:$/,/^# End of the help/{/^# End/d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 0
}

# Reads the flags. Each script has a function `own_flag NAME VALUE` for its own flags, which returns the number of words
# that it used, 0 for an unknown flag.
parse_flags() {
    np='' hosts='' interfaces='' env_file=''
    exported=() launcher_args=() command=()
    local used
    while (($#)); do
        case $1 in
            -h | --help) show_help ;;
            --) shift && command=("$@") && return ;;
            -np | --hosts | --interfaces | -x | --env-file | --launcher-args)
                (($# > 1)) || die 2 "$1 needs a value; see $me --help"
                read_flag "$1" "$2"
                used=2
                ;;
            *)
                used=0
                own_flag "$1" "${2:-}" || used=$?
                ((used)) || die 2 "unknown argument '$1'; put flags of training after '--'; see $me --help"
                ;;
        esac
        shift "$used"
    done
}

read_flag() { # read_flag NAME VALUE
    case $1 in
        -np)
            [[ $2 =~ ^[1-9][0-9]*$ ]] || die 2 "-np '$2' is not a number of ranks; give one, as in -np 8"
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
            [[ -z $(find "$env_file" -prune \( -perm -040 -o -perm -004 \)) ]] ||
                printf '%s: warning: other users can read --env-file %s; run chmod 600 %s\n' "$me" "$2" "$2" >&2
            ;;
        --launcher-args) read -ra launcher_args <<<"$2" ;;
    esac
}

# Sets `names` and `slots`, with one entry per host, and `np`.
read_hosts() {
    names=() slots=()
    local host total=0 list
    IFS=, read -ra list <<<"$hosts"
    for host in "${list[@]}"; do
        [[ $host =~ ^[A-Za-z0-9._-]+(:[1-9][0-9]*)?$ ]] || die 2 "--hosts: '$host' is not a host; write them as h1:4,h2:4"
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

# Sets `python`, and `command` to the whole command line of a rank.
find_python() {
    local venv=${HVDQN_VENV:-$repo/.venv}
    if [[ -n ${HVDQN_VENV:-} || -x $venv/bin/python ]]; then
        python=$venv/bin/python
        [[ -x $python ]] || die 2 "no Python at $python; run launch/setup.sh, or set HVDQN_VENV to another environment"
        venv=$(cd -- "$venv" && pwd) # an absolute path, because other hosts use it
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

# Sets `remote` to those of `names` that are not this host.
find_remote_hosts() {
    remote=()
    ((${#names[@]})) || return 0
    local found
    found=$("$python" -m hvdqn.launchers.remote_hosts "${names[@]}")
    [[ -z $found ]] || mapfile -t remote <<<"$found"
}

# Checks all remote hosts at the same time: they must be up and have the folder and programs that this host has.
# Launchers would fail too, but after minutes, one host after the other, or without naming the host.
check_hosts() { # check_hosts PROGRAM...
    local host file check
    check="cd $(quote "$PWD")"
    for file; do check+=" && test -x $(quote "$file")"; done
    local -A checks=()
    for host in "${remote[@]}"; do
        # shellcheck disable=SC2029 # quoted for the remote shell
        ssh "${ssh_options[@]}" "$host" "$check" 2>"$scratch/ssh-$host" &
        checks[$host]=$!
    done
    local code failed=0
    for host in "${remote[@]}"; do
        code=0
        wait "${checks[$host]}" || code=$?
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

quote() { # quote WORD: for any POSIX shell, since a remote shell may not be bash
    printf "'%s'" "${1//\'/\'\\\'\'}"
}

# Sets `rank_env`, the environment of the ranks, as NAME=VALUE. The launcher runs under `env -i` with it.
compose_environment() {
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # until hvdqn divides the cores among the ranks
    [[ -t 1 ]] || export TERM=dumb               # launchers give ranks a terminal even if this script has none
    rank_env=()
    local name
    while read -r name; do
        if [[ $name =~ ^($passed_user|$passed_python|$passed_job)$ ]] && ! is_secret "$name"; then
            rank_env+=("$name=${!name}")
        fi
    done < <(compgen -e)
    for name in "${exported[@]}"; do rank_env+=("$name=${!name}"); done
}

# Puts a small shell program in front of `command`. It leaves the rank's process id in a file for `forward_stop`,
# sources the file with secrets, and becomes the command.
wrap_command() {
    # shellcheck disable=SC2016 # expanded by the rank's shell
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

# Handles a signal to this script: the first one asks the ranks on this host to write a checkpoint and stop.
forward_stop() {
    interrupted=1
    stops=$((stops + 1))
    local ranks=("$scratch/ranks/$(uname -n)":*) # other hosts may share TMPDIR, so the name contains the host
    if ((stops > 1)) || [[ ! -e ${ranks[0]} ]]; then
        ((stops > 1)) || printf '%s: no rank runs on this host, so none can write a checkpoint: ending the job\n' "$me" >&2
        kill -TERM "${launched[@]}" 2>/dev/null || true
    else
        printf '%s: stopping: the ranks write a checkpoint\n' "$me" >&2
        kill -USR2 "${ranks[@]##*:}" 2>/dev/null || true
    fi
}

# Sets `code` to the exit code of a child. A signal interrupts `wait`, so it may take several calls.
wait_for() { # wait_for PID
    interrupted=1
    while ((interrupted)); do
        interrupted=0
        code=0
        wait "$1" || code=$?
    done
}

# Runs the launcher in the background, so that this script receives the signals.
run_launcher() { # run_launcher COMMAND...
    launched=() stops=0
    trap forward_stop TERM USR2 INT
    env -i "${rank_env[@]}" "$@" &
    launched=("$!")
    wait_for "$!"
    exit "$code"
}

# Sets `mpi_args`, and those of Open MPI's variables that the user has not set.
mpi_settings() {
    local mpirun
    mpirun=$(command -v mpirun) ||
        die 2 "no mpirun in PATH; run launch/setup.sh, load your site's MPI module, or start with launch/torchrun.sh"
    [[ $(mpirun --version 2>&1) == *"Open MPI"* ]] ||
        die 2 "$mpirun is not Open MPI's, whose flags this script uses; start hvdqn with your MPI's own mpiexec"
    check_hosts "$python" "$mpirun"

    # The folder of mpirun's daemon on the other hosts: ssh does not get this shell's PATH and LD_LIBRARY_PATH.
    mpi_args=(--prefix "$(dirname -- "$(dirname -- "$mpirun")")")
    : "${OMPI_MCA_plm_rsh_args:=${ssh_options[*]}}"
    # btl connects the ranks, oob the daemons.
    [[ -z $interfaces ]] || : "${OMPI_MCA_btl_tcp_if_include:=$interfaces}" "${OMPI_MCA_oob_tcp_if_include:=$interfaces}"
    # Open MPI does not run as root unless told to. In a container there is often no other user.
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
    need_module hvdqn "run launch/setup.sh"
    scratch=$(mktemp -d "${TMPDIR:-/tmp}/hvdqn-launch.XXXXXX")
    trap 'rm -rf -- "$scratch"' EXIT
    find_remote_hosts
}
