
# --- From here on, every job's script is the same.

tell() { # STATE [EXIT_STATUS]: write the state where `tinytron status` reads it
    [ "${NODE_RANK:-0}" = 0 ] && [ -d "$status" ] || return 0
    printf '{%s, "host": "%s", "pid": %s, "slurm_job": "%s", "state": "%s", "exit_status": %s, "port": %s}\n' \
        "$described" "$(uname -n)" "$$" "${SLURM_JOB_ID:-}" "$1" "${2:-null}" "${port:-null}" >"$status/metadata.json.$BASHPID"
    mv -f "$status/metadata.json.$BASHPID" "$status/metadata.json"
}

say() { printf 'tinytron: %s\n' "$1" >&2; }

fail() {
    say "error: $1"
    exit 2
}

stop_child() { # SIGNAL: pass it on; the run saves and exits
    stop="$1"
    signals=$((signals + 1))
    say "got $1"
    if [ -z "$child" ]; then exit 143; fi
    kill -s "$1" -- "$child" 2>/dev/null || kill -s "$1" "${child#-}" 2>/dev/null || true # it may have no group yet
}

leave() { # EXIT_STATUS
    trap - EXIT
    trap '' TERM USR1
    if [ -n "$beating" ]; then kill -KILL "$beating" 2>/dev/null || true; fi
    local state=failed
    if [ "$1" = 0 ] && [ -z "$stop" ]; then
        state=finished
    elif [ "$1" = 75 ] || { [ -n "$stop" ] && { [ "$1" = 0 ] || [ "$1" = 143 ] || [ "$1" = 138 ]; }; }; then
        state=preempted # the same script continues the run
        if [ -e "$here/cancelled" ]; then state=cancelled; fi
    fi
    if [ "$state" = failed ] && [ -d "$here" ]; then : >"$here/failed"; fi # SLURM then stops the other nodes with SIGTERM
    tell "$state" "$1" || true
    case "$state" in # after a failure they stay: SLURM may queue the job again, when it sees that a node is lost
    finished | cancelled) if [ "${NODE_RANK:-0}" = 0 ]; then rm -f "$here"/secret.*; fi ;;
    esac
    if [ -n "$mount" ]; then exec 7<&-; fi
    if [ -n "$mounted" ]; then juicefs umount "$root" || say "$root stays mounted: other jobs use it"; fi
    # The run is saved. Kubernetes starts pods again that do not end with 0; SLURM stops the other nodes for them.
    if [ "$state" = preempted ] && [ -n "${KUBERNETES_SERVICE_HOST:-}" ] && [ -z "${SLURM_JOB_ID:-}" ]; then exit 75; fi
    if [ "$1" = 75 ] && [ -n "$stop" ]; then exit 0; fi
    exit "$1"
}

read_secrets() {
    local entry variable file value
    for entry in "${secrets[@]}"; do
        variable="${entry%%:*}" file="${entry#*:}"
        if [ -n "$file" ]; then
            value="$(cat -- "$file")" || fail "the secret $variable cannot be read from $file; write it to that file"
        else
            value="${!variable:-}"
            [ -n "$value" ] || fail "the environment variable $variable is not set; set it before this script starts"
        fi
        export "$variable=$value"
    done
}

export_variables() { # for tools. A variable of this script or of bash keeps its value here; the job gets all of them
    local entry flags
    for entry in "${variables[@]}"; do
        flags="$(declare -p "${entry%%=*}" 2>/dev/null || true)" flags="${flags#declare -}"
        case "${flags%% *}" in
        *r*) ;;
        "" | *x*) export "${entry?}" ;;
        esac
    done
}

check_folders() { # variables such as TINYTRON_ROOT may have changed them
    local one
    for one in root work share status data checkpoints results; do
        case "${!one}" in
        "" | /*) ;;
        *) fail "the folder $one must be an absolute path, but it is ${!one}; use one such as TINYTRON_ROOT=/data/out" ;;
        esac
    done
}

mount_storage() {
    [ -n "$mount" ] || return 0
    if mountpoint -q "$root"; then
        say "$root is mounted"
    else
        command -v juicefs >/dev/null ||
            fail "juicefs is not installed on $(uname -n), so $root cannot be mounted; install juicefs there, or leave out mount"
        mkdir -p "$root"
        juicefs mount -d "${mount_options[@]}" "$mount" "$root" || fail "juicefs cannot mount $mount at $root (see above)"
        mountpoint -q "$root" || fail "juicefs returned, but $root is not mounted; see the log of juicefs"
        mounted=1
    fi
    exec 7<"$root" # while it is open, another job that ends cannot unmount the volume
    { mountpoint -q "$root" && [ "$root" -ef "/proc/$$/fd/7" ]; } || fail "another job unmounted $root just now; submit again"
}

make_folders() {
    mkdir -p "$root" "$work" "$share/code" "$share/env" "$status"
    if [ "${NODE_RANK:-0}" = 0 ]; then
        local entry part target
        for entry in "data:$data" "checkpoints:$checkpoints" "results:$results"; do
            part="${entry%%:*}" target="${entry#*:}"
            if [ -z "$target" ]; then continue; fi
            mkdir -p "$target"
            [ -e "$root/$part" ] || ln -s "$target" "$root/$part"
            [ "$root/$part" -ef "$target" ] || fail "$root/$part exists and is not $target; move it there, or leave out $part"
        done
        log="${log:-${TINYTRON_LOG:-}}" # SLURM's log has the job's number
        if [ -n "$log" ]; then ln -sfn "$log" "$status/output.log"; fi
    fi
}

patiently() { # COMMAND: a signal stops it and all that it started, at once
    setsid "$@" </dev/null & # a process group of its own
    child=-$!
    # Bash may wait for ever when a signal comes just before `wait`, so look instead; traps run between two looks.
    while kill -0 "${child#-}" 2>/dev/null; do sleep 0.5; done
    if [ -n "$stop" ]; then exit 143; fi
    local code=0
    wait "${child#-}" || code=$?
    child=""
    return "$code"
}

lock() { # FILE: until descriptor 8 is closed
    exec 8>"$1"
    until flock -w 1 8; do # a signal is handled between two tries
        [ $? = 1 ] || fail "$1 cannot be locked; set share to a folder of yours on a file system with locks"
    done
}

unpack_code() { # once per commit; several jobs and nodes may arrive at the same time
    if [ -d "$code" ]; then return 0; fi
    lock "$code.lock"
    if [ ! -d "$code" ]; then
        rm -rf "$code.part"
        mkdir "$code.part"
        # tar reads backslashes in its arguments as escapes, so it gets no path.
        (cd "$code.part" && tar -xz --no-same-owner) <"$archive" || fail "the code cannot be unpacked from $archive"
        mv "$code.part" "$code"
    fi
    exec 8>&-
}

make_environment() { # once per list of packages
    if [ -n "$python" ]; then return 0; fi
    local key environment
    key="$({ echo "${uv_groups[*]}" && cd "$code" && cat uv.lock requirements.txt constraints.txt pyproject.toml setup.py 2>/dev/null; } |
        sha256sum | cut -c1-16)" || true
    environment="$share/env/$key"
    python="$environment/bin/python"
    if [ -e "$environment/complete" ]; then return 0; fi
    lock "$environment.lock"
    if [ ! -e "$environment/complete" ]; then
        say "making the environment $environment, once"
        rm -rf "$environment"
        patiently bash -c "$(declare -p code python uv_groups)"$'\n'"$(declare -f say install_packages)"$'\ninstall_packages "$1"' \
            bash "$environment" >&2 ||
            fail "the environment cannot be made (see above); or set python in the cluster's settings"
        touch "$environment/complete"
    fi
    exec 8>&-
}

install_packages() { # FOLDER
    cd "$code" || return
    local packages=()
    if [ -e uv.lock ] && command -v uv >/dev/null; then
        UV_PROJECT_ENVIRONMENT="$1" uv sync --frozen --no-install-project "${uv_groups[@]/#/--group=}"
        return
    fi
    if [ -e constraints.txt ]; then packages+=(-c constraints.txt); fi
    if [ -e requirements.txt ]; then
        packages+=(-r requirements.txt)
    elif [ -e pyproject.toml ] || [ -e setup.py ]; then
        packages+=(".[cli]")
    else
        say "error: the code has none of uv.lock, requirements.txt, pyproject.toml and setup.py, which name its packages"
        return 2
    fi
    if command -v uv >/dev/null; then
        uv venv "$1" || return
        uv pip install --python "$python" "${packages[@]}"
    else
        python3 -m venv "$1" || return
        "$python" -m pip install --quiet --disable-pip-version-check "${packages[@]}"
    fi
}

list_gpus() { # index and memory in use of each GPU whose name has all words of the kind: `rtx4090` is RTX 4090, too
    local index used name part
    nvidia-smi --query-gpu=index,memory.used,name --format=csv,noheader,nounits | while IFS=', ' read -r index used name; do
        name="${name,,}"
        name="${name//-/ }"
        name=" $name $(sed -E 's/([a-z]) ([0-9])/\1\2/g' <<<"$name") "
        for part in "${gpu_kind[@]}"; do
            case "$name" in *" $part "*) ;; *) continue 2 ;; esac
        done
        echo "$index, $used"
    done
}

make_lock() { # FILE: for all users; opening another user's file for writing may be forbidden here
    [ -e "$1" ] || (umask 0 && : >>"$1") || true
}

take_gpus() { # one lock per GPU of this machine, until this process and its children end
    if [ "$lock_gpus" = 0 ]; then return 0; fi
    local locks=/tmp/tinytron-gpus index used fd door gpus taken told=""
    gpus="$(list_gpus)" || fail "nvidia-smi finds no GPU on $(uname -n)"
    [ "$(grep -c . <<<"$gpus")" -ge "$lock_gpus" ] ||
        fail "$(uname -n) has fewer than $lock_gpus GPUs${gpu_kind:+ of the kind ${gpu_kind[*]}}; ask for fewer with -n"
    [ -d "$locks" ] || mkdir -m 1777 "$locks" || true
    export CUDA_DEVICE_ORDER=PCI_BUS_ID # as nvidia-smi counts
    while :; do
        make_lock "$locks/door"
        exec {door}<"$locks/door"
        flock "$door"
        CUDA_VISIBLE_DEVICES="" taken=()
        while IFS=', ' read -r index used; do
            if [ "${#taken[@]}" = "$lock_gpus" ]; then break; fi
            if [ "$used" -gt 1024 ]; then continue; fi # used by a program that takes no lock
            make_lock "$locks/$index"
            exec {fd}<"$locks/$index"
            if flock -n "$fd"; then
                taken+=("$fd")
                CUDA_VISIBLE_DEVICES="$CUDA_VISIBLE_DEVICES${CUDA_VISIBLE_DEVICES:+,}$index"
            else
                exec {fd}<&-
            fi
        done <<<"$gpus"
        exec {door}<&-
        if [ "${#taken[@]}" = "$lock_gpus" ]; then break; fi
        for fd in "${taken[@]}"; do exec {fd}<&-; done
        if [ -z "$told" ]; then say "waiting for $lock_gpus free GPUs" && told=1; fi
        tell waiting
        sleep 10
        gpus="$(list_gpus)"
    done
    export CUDA_VISIBLE_DEVICES
    say "using the GPUs $CUDA_VISIBLE_DEVICES"
}

beat() { # the heartbeat is the time of the file; until the script ends, however it ends
    trap '' TERM USR1
    exec 7<&- # its sleep outlives it, and must not keep the volume mounted
    while sleep "$heartbeat_seconds" && kill -0 $$ 2>/dev/null; do touch -c "$status/metadata.json"; done
}

run_job() {
    # Packages come from the code that was sent, never from the working directory; Python 3.10 looks there first.
    local found="$code"
    if [ -d "$code/src" ]; then found+=":$code/src"; fi
    local ours=("PYTHONPATH=$found${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1) lifeline=()
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then ours+=("CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"); fi
    if [ -e "$work/tinytron" ] && ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        fail "Python would import $work/tinytron instead of the code that was sent; use another work folder, or Python 3.11"
    fi
    cd "$work"
    local command=(tinytron run "$name" "$here/config.yaml" "$root" "${arguments[@]}")
    if [ "$notebook" = 1 ]; then
        local address=127.0.0.1
        "$python" -c 'import jupyterlab' || fail "jupyterlab is not installed for $python; add it to the packages of the code"
        if [ -n "${SLURM_JOB_ID:-}" ]; then address="$(uname -n)"; fi # the tunnel ends at the login node
        port="$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')" ||
            fail "there is no free port for Jupyter"
        command=(jupyter lab --no-browser --allow-root "--ip=$address" "--port=$port" --ServerApp.port_retries=0)
        cd "$code"
    fi
    # If this script is killed, the run is asked to save and stop.
    if setpriv --pdeathsig TERM true 2>/dev/null; then lifeline=(setpriv --pdeathsig TERM --); fi
    tell running
    "${lifeline[@]}" env -- "${variables[@]}" "${ours[@]}" "$python" -m "${command[@]}" &
    child=$!
    local before code
    while :; do # a signal ends `wait` early, and the job's own status is in a later one
        before=$signals code=0
        wait "$child" || code=$?
        if [ "$signals" = "$before" ]; then break; fi
    done
    child=""
    return "$code"
}

stop="" signals=0 child="" beating="" mounted="" port=""
trap 'leave $?' EXIT
trap 'stop_child TERM' TERM
trap 'stop_child USR1' USR1
trap 'case "$child" in -*) stop_child TERM ;; "") exit 130 ;; esac' INT # Ctrl-C; a run gets it itself
mkdir -p "$status"
if [ -e "$here/cancelled" ]; then
    say "cancelled before it began"
    stop=TERM
    exit 143
fi
export_variables
check_folders
read_secrets
mount_storage
make_folders
tell preparing
beat </dev/null >/dev/null 2>&1 &
beating=$!
disown "$beating" # its end is not worth a line in the log
unpack_code
make_environment
take_gpus
run_job
