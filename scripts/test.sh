#!/usr/bin/env bash
# All checks: style (ruff), types (mypy) and tests (pytest), the first two run by the tests themselves.
#
#   bash scripts/test.sh                 what CI runs
#   bash scripts/test.sh -m slow         the long ones
#   bash scripts/test.sh tests/model     some
set -euo pipefail
source "$(dirname "$0")/lib/env.sh"
modules="torch numpy tqdm tokenizers matplotlib pytest hypothesis ruff mypy datasets transformers tiktoken gguf omegaconf s3fs moto"
if [ "$(uname)" = Linux ]; then modules="$modules triton"; fi # there is none for other systems
# shellcheck disable=SC2086  # one word a module
need_python dev $modules
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # tests start several processes at a time
case " $* " in
    *" -m "*) exec "$PYTHON" -m pytest "$@" ;;
    *) exec "$PYTHON" -m pytest -m "not slow and not gpu" "$@" ;;
esac
