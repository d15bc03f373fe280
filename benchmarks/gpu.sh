#!/usr/bin/env bash
# Runs every measurement and check that needs a GPU, in less than ten minutes and without a network:
#
#     benchmarks/gpu.sh [FOLDER [PART ...]]
#
# JSON, CSV, the figure and the log go to FOLDER (benchmarks/results). The PARTs are epoch, float32, bfloat16, parts,
# fused, parity, scaling and plan, which shows the bounds of gpu_plan.py beside the times of bfloat16 and parts; by
# default all of them run. PYTHON is the interpreter (python). PATIENCE=2 doubles the time limits. SMALL=1 runs tiny
# sizes on CPU and no plan, to test this script.
#
# If a part fails, the others still run, and the exit status is 1.
set -uo pipefail
folder=$(realpath -m "${1:-$(dirname "$0")/results}")
chosen=" ${*:2} "
python=${PYTHON:-python}
mkdir -p "$folder" || exit
cd "$(dirname "$0")/.." || exit

if [[ ${SMALL:-} ]]; then
    export JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES=
    device=cpu-small rows=(jax torch-eager) patience=5
    model=(--preset digits --image-shape 8 8 1 --batch-size 8 --rounds 2)
    parts=(inference dispatch epoch)
    epoch=(--small --batch-size 8 --epochs 2) parity=(--routing uniform --steps 1) scaling=(--small --rounds 2)
else
    export XLA_PYTHON_CLIENT_PREALLOCATE=false # leaves memory for PyTorch
    device=gpu rows=(jax torch-eager torch-compile) patience=${PATIENCE:-1}
    model=(--batch-size 256 --rounds 9)
    parts=(inference stem primary votes routing decoder optimizer augmentation dispatch epoch)
    epoch=() parity=(--device gpu --preset readable --all-routings --steps 5 --dtype float32) scaling=(--seconds $((60 * patience)))
fi
exec > >(tee -a "$folder/$device.log") 2>&1

capsnet=(-m capsnet_jax)
summary=() failed=0

# Runs a part, if it was chosen, with a time limit: part NAME SECONDS ARGUMENTS-OF-PYTHON...
part() {
    local name=$1 limit=$((patience * $2)) start=$SECONDS status told
    [[ $chosen == "  " || $chosen == *" $name "* ]] || return 0
    echo "=== $name"
    timeout --kill-after=5 "$limit" "$python" "${@:3}"
    status=$?
    ((status == 0)) || failed=1
    case $status in
        0) told=ok ;;
        124 | 137) told="not finished in $limit s" ;;
        *) told="failed with status $status" ;;
    esac
    summary+=("$(printf '%-10s %4d s  %s' "$name" $((SECONDS - start)) "$told")")
}

# Runs `capsnet benchmark` as a part: bench NAME SECONDS OPTIONS...
bench() {
    part "$1" "$2" "${capsnet[@]}" benchmark "${model[@]}" --json "$folder/$device-$1.json" "${@:3}"
}

# The limits sum to 9 minutes and 15 seconds, plus 40 seconds if every part must be killed.
part epoch 45 benchmarks/whole_epoch.py "${epoch[@]}" --json "$folder/$device-epoch.json"
bench float32 95 --precision float32 --rows "${rows[@]}" --measure step gemm
bench bfloat16 95 --precision bfloat16 --rows "${rows[@]}" --measure step gemm
bench parts 80 --precision bfloat16 --rows jax torch-eager --measure "${parts[@]}"
bench fused 35 --precision float32 --rows jax --measure step routing --routing-implementation fused
part parity 85 "${capsnet[@]}" verify "${parity[@]}" --json "$folder/$device-parity.json"
part scaling 75 benchmarks/scaling_curves.py "${scaling[@]}" --output "$folder/$device-scaling"
if [[ ! ${SMALL:-} ]]; then
    gpu=h100
    [[ $(nvidia-smi --list-gpus 2>/dev/null) != *H200* ]] || gpu=h200
    part plan 45 benchmarks/gpu_plan.py --gpu $gpu --json "$folder/$device-plan.json" \
        --measured "$folder/$device-bfloat16.json" "$folder/$device-parts.json"
fi

echo "=== $folder"
printf '%s\n' "${summary[@]}"
exit "$failed"
