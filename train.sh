#!/usr/bin/env bash
# Install what training needs and train. Needs Python >= 3.10 and nothing else.
#
#   bash train.sh                the miniature: offline, no GPU, no key, a few minutes
#   bash train.sh --preset paper --data train.jsonl --judge-url URL
#                                the published run: see the README first
#
# All arguments go to polaris.py (`bash train.sh --help` lists them). A second run installs nothing.
# The exit status is that of polaris.py: 0 done, 2 settings, 3 judge, 4 interrupted, 5 stopped itself.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# 1. An environment of its own, so that the pinned versions change nothing else on the machine.
if [ ! -x "$here/.venv/bin/pip" ]; then
    python3 -m venv "$here/.venv" || {
        echo "train.sh: python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    }
fi
log=$here/.venv/install.log
cmp -s "$here/requirements.txt" "$here/.venv/installed.txt" || echo "installing (log: $log)"
if ! "$here/.venv/bin/pip" install --disable-pip-version-check -r "$here/requirements.txt" >"$log" 2>&1; then
    tail -n 5 "$log" >&2
    echo "train.sh: the installation failed; all of it is in $log" >&2
    exit 1
fi
cp "$here/requirements.txt" "$here/.venv/installed.txt"

# 2. One rank per GPU; without a GPU four ranks on the CPU, so that the miniature is sharded like the real run.
ranks=$("$here/.venv/bin/python" -c 'import torch; print(torch.cuda.device_count() or 4)') || exit 1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # what torchrun would set, with a warning
# Rows of all lengths would fragment a GPU that is nearly full.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
status=$(mktemp) # torchrun returns 1, whatever its ranks return: they leave their status here
export POLARIS_EXIT_STATUS=$status
# A signal goes to the ranks, which save and end; torchrun would print two hundred lines about it.
export POLARIS_GRACE=600
(
    trap '' INT HUP
    exec "$here/.venv/bin/torchrun" --standalone --nproc_per_node="$ranks" --signals-to-handle SIGTERM \
        --shutdown-timeout "$POLARIS_GRACE" "$here/polaris.py" "$@"
) &
launcher=$!
for name in INT TERM HUP; do
    # shellcheck disable=SC2064
    trap "pkill -$name -P $launcher" "$name"
done
code=0
while kill -0 "$launcher" 2>/dev/null; do # a trap ends a wait early
    wait "$launcher"
    code=$?
done
[ -s "$status" ] && code=$(cat "$status")
rm -f "$status"
exit "$code"
