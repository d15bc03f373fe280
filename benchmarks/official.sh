#!/usr/bin/env bash
# Trains the preset `official` to its last step, 300,000 on MNIST, in calls of less than ten minutes each:
#
#     benchmarks/official.sh runs/official --data-dir DIR --seeds 4
#
# The arguments after the run folder are passed to `capsnet train`. Exit status 75 means that training is not finished:
# call again with the same arguments. 0 means finished; any other status is that of `capsnet train`. Each call prints
# the time of all calls so far. PRESET and DATASET name others (official, mnist), LIMIT is the number of seconds after
# which a call is asked to save and stop (540), and PYTHON is the interpreter (python).
set -uo pipefail
run_dir=${1:?expected the run folder, and options of capsnet train}

# Compiled programs are kept beside the run folder for the next call.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$run_dir.compiled}
timeout --foreground --preserve-status --kill-after=45 "${LIMIT:-540}" "${PYTHON:-python}" "$(dirname "$0")/../train.py" \
    --preset "${PRESET:-official}" --dataset "${DATASET:-mnist}" --run-dir "$run_dir" --resume "${@:2}"
status=$?

echo "$SECONDS" >>"$run_dir.seconds"
calls=$(<"$run_dir.seconds")
total=$((${calls//$'\n'/+}))
seeds=("$run_dir"/seed-*/)
echo "$total s so far, $((total / ${#seeds[@]})) s per seed"
((status == 143)) && status=75 # stopped by SIGTERM
exit "$status"
