# Source this file; do not run it. `need_python EXTRA MODULE...` sets $PYTHON to an interpreter that can import every
# MODULE: the active one if possible, otherwise the one in the checkout's .venv, which is created and filled when necessary.
#
#   TORCH_SPEC='torch==2.11.0'   use this torch instead of the one in constraints.txt

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
cd "$ROOT"


_has() {
    local python="$1"
    shift
    command -v "$python" >/dev/null 2>&1 && "$python" - "$@" >/dev/null 2>&1 <<'PY'
import importlib.metadata, importlib.util, sys
assert sys.version_info >= (3, 10)
assert all(importlib.util.find_spec(name) for name in sys.argv[1:])
assert tuple(int(n) for n in importlib.metadata.version("torch").split("+")[0].split(".")[:2]) >= (2, 11)
PY
}

_base_python() { # the newest Python >= 3.10 on this machine
    local name
    for name in python3.13 python3.12 python3.11 python3.10 python3 python; do
        if command -v "$name" >/dev/null 2>&1 && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "error: no Python >= 3.10 found; install one (Debian: apt-get install python3 python3-venv)" >&2
    return 1
}

find_python() { # MODULE...: sets $PYTHON to an interpreter that can import them; fails if there is none
    local candidate
    for candidate in python python3 "$ROOT/.venv/bin/python"; do
        if _has "$candidate" "$@"; then
            PYTHON="$(command -v "$candidate")"
            export PYTHON PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
            return
        fi
    done
    return 1
}

need_python() {
    local extra="$1"
    shift
    if find_python "$@"; then return; fi
    _install "$extra" "$@"
    exec 9>&- # the lock must not outlive the installation
    PYTHON="$ROOT/.venv/bin/python"
    export PYTHON PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    if ! _has "$PYTHON" "$@"; then
        echo "error: .venv lacks one of: $* (torch >= 2.11); remove .venv and try again" >&2
        return 1
    fi
}

_install() {
    local extra="$1" base constraints="$ROOT/constraints.txt"
    shift
    if command -v flock >/dev/null 2>&1; then # one installation at a time, even if several nodes share the folder
        exec 9>"$ROOT/.venv.lock"
        flock 9
        if _has "$ROOT/.venv/bin/python" "$@"; then return; fi
    fi
    if ! "$ROOT/.venv/bin/python" -m pip --version >/dev/null 2>&1; then # there is no .venv, or an incomplete one
        rm -rf "$ROOT/.venv"
        base="$(_base_python)"
        echo "setting up .venv with $("$base" --version) (once; this takes a minute or more)" >&2
        if ! "$base" -m venv "$ROOT/.venv" >&2; then
            rm -rf "$ROOT/.venv"
            echo "error: $base cannot make a virtual environment; install its venv module (Debian: apt-get install python3-venv)" >&2
            return 1
        fi
    else
        echo "installing what is missing into .venv" >&2
    fi
    if [ -n "${TORCH_SPEC:-}" ]; then
        constraints="$(mktemp)"
        grep -Ev '^(torch|triton)==' "$ROOT/constraints.txt" >"$constraints"
    fi
    if ! "$ROOT/.venv/bin/python" -m pip install -qq --disable-pip-version-check -c "$constraints" \
        ${TORCH_SPEC:+"$TORCH_SPEC"} -e "$ROOT${extra:+[$extra]}" >&2; then
        echo "error: pip could not install what is needed (see above); call again to continue, or remove .venv" >&2
        return 1
    fi
}
