#!/usr/bin/env bash
# All checks: style (ruff), types (mypy) and tests (pytest); the tests themselves run the first two.
#
#   bash scripts/test.sh                 the tests that CI runs
#   bash scripts/test.sh -m slow         the slow tests
#   bash scripts/test.sh tests/model     the tests of one folder
#   TEST_PROCESSES=0 bash scripts/test.sh   one file after another; the default runs two at a time
set -euo pipefail
source "$(dirname "$0")/lib/env.sh"
modules="torch numpy tqdm tokenizers matplotlib pytest xdist hypothesis ruff mypy datasets transformers peft tiktoken gguf omegaconf s3fs moto mkdocs material mkdocstrings_handlers tensorboard wandb kubernetes_validate kubeflow_trainer_api"
if [ "$(uname)" = Linux ]; then modules="$modules triton"; fi # triton exists only for Linux
# shellcheck disable=SC2086  # each word is a module
need_python dev $modules
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # tests start several processes at once
case " $* " in
    *" -m "*) exec "$PYTHON" -m pytest "$@" ;;
    *) exec "$PYTHON" -m pytest -n "${TEST_PROCESSES:-2}" --dist loadfile -m "not slow and not gpu" "$@" ;;
esac
