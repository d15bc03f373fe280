#!/usr/bin/env bash
# The preset `official` to its last step, 300,000 on MNIST, in calls of less than ten minutes each:
#
#     benchmarks/official.sh runs/official --data-dir DIR --seeds 4
#
# Call it again, with the same arguments, for as long as the exit status is 75: there is more to do. 0 means that it has
# finished, anything else is that of `capsnet train`, which the arguments after the folder go to. Each call tells how
# long all calls took so far. PRESET and DATASET name others (official, mnist), LIMIT is the number of seconds after
# which a call is asked to save and stop (540), and PYTHON the interpreter (python).
set -uo pipefail
run_dir=${1:?expected the run folder, and options of capsnet train}

# Beside the run folder: what is compiled in the first call is there for the others.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$run_dir.compiled}
timeout --foreground --preserve-status --kill-after=45 "${LIMIT:-540}" "${PYTHON:-python}" "$(dirname "$0")/../train.py" \
    --preset "${PRESET:-official}" --dataset "${DATASET:-mnist}" --run-dir "$run_dir" --resume "${@:2}"
status=$?

echo "$SECONDS" >>"$run_dir.seconds"
calls=$(<"$run_dir.seconds")
total=$((${calls//$'\n'/+}))
seeds=("$run_dir"/seed-*/)
echo "$total s so far, $((total / ${#seeds[@]})) s for each seed"
((status == 143)) && status=75 # stopped by SIGTERM
exit "$status"
