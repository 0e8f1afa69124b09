#!/usr/bin/env bash
# Restart what can be retried, stop on what cannot:  bash docs/supervise.sh OUT [options of the first start]
out=$1; shift
for try in 1 2 3 4 5; do
    if [ -f "$out/config.json" ]; then bash train.sh --out "$out" --resume
    else bash train.sh --out "$out" "$@"; fi
    status=$?
    case $status in 0 | 2 | 4) exit $status ;; esac   # done, hopeless, or asked to stop
    sleep $((60 * try))                                # 1, 3, 5: the judge or the machine may be back
done
exit $status
