#!/usr/bin/env bash
# Install what training needs and train. Needs Python >= 3.10 and nothing else.
#
#   bash train.sh                the miniature: offline, no GPU, no key, a few minutes
#   bash train.sh --preset paper --data train.jsonl --judge-url URL
#                                the published run: see the README first
#
# All arguments go to polaris.py (`bash train.sh --help` lists them). A second run installs nothing.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# 1. An environment of its own, so that the pinned versions change nothing else on the machine.
if [ ! -x "$here/.venv/bin/pip" ]; then
    python3 -m venv "$here/.venv" || {
        echo "train.sh: python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    }
fi
"$here/.venv/bin/pip" install --disable-pip-version-check -r "$here/requirements.txt" |
    sed '/already satisfied/d; /^Ignoring/d'

# 2. One rank per GPU; without a GPU four ranks on the CPU, so that the miniature is sharded like the real run.
ranks=$("$here/.venv/bin/python" -c 'import torch; print(torch.cuda.device_count() or 4)')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # what torchrun would set, with a warning
# Rows of all lengths would fragment a GPU that is nearly full.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
exec "$here/.venv/bin/torchrun" --standalone --nproc_per_node="$ranks" "$here/polaris.py" "$@"
