#!/usr/bin/env bash
# Install what the tests need and run them: style, types, then properties. On a CPU; no network once installed.
#
#   bash tests/run.sh                    everything
#   bash tests/run.sh -m "not slow"      the fast part; arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/pip ] || python3 -m venv .venv
.venv/bin/pip install --disable-pip-version-check -r requirements.txt -r tests/requirements.txt |
    sed '/already satisfied/d; /^Ignoring/d'

# The CUDA build of torch brings Triton. The CPU build does not, and the tests run the kernels in its interpreter.
.venv/bin/python -c 'import triton' 2>/dev/null ||
    .venv/bin/pip install --disable-pip-version-check triton==3.6.0

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy ./*.py corpus evals mini
.venv/bin/python -m pytest tests -q --durations=10 "$@"
