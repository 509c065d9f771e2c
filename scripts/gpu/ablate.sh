#!/usr/bin/env bash
# A table of `mmmamba ablate` on all GPUs of this machine: a shard for each, several cells at once on each of them.
#
#     scripts/gpu/ablate.sh OUT JOBS nano-ablation --only stages --only placement
#     LIMIT=500 scripts/gpu/ablate.sh OUT JOBS nano-ablation     # stopped after so many seconds; the same command goes on
#
# JOBS cells run at a time on each GPU. Small models do not fill one, but processes take turns on it unless they share it
# through NVIDIA's multi-process service: that is started on a machine of one GPU that has it (six cells took 88 s
# on an H200, and without it none had ended after nearly two minutes; on two GPUs, a service each, they did not end, so
# that it is left out there). It ends with the command that merges the shards' results.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=$1 jobs=$2 table=$3
shift 3
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
mkdir -p "$out"
count=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')
if [ "$count" = 1 ] && [ "$jobs" -gt 1 ] && command -v nvidia-cuda-mps-control > /dev/null; then
    mkdir -p "$out/mps/pipe" "$out/mps/log"
    export CUDA_MPS_PIPE_DIRECTORY=$(realpath "$out/mps/pipe") CUDA_MPS_LOG_DIRECTORY=$(realpath "$out/mps/log")
    nvidia-cuda-mps-control -d
    trap 'echo quit | timeout 10 nvidia-cuda-mps-control || true' EXIT
fi
pids=() files=()
for ((gpu = 0; gpu < count; gpu++)); do
    shard=$out/shard$((gpu + 1))
    CUDA_VISIBLE_DEVICES=$gpu timeout -k 20 -s INT "${LIMIT:-0}" "$python" -m mmmamba ablate "$table" "$@" \
        --shard "$((gpu + 1))/$count" --jobs "$jobs" --out "$shard" > "$shard.log" 2>&1 &
    pids+=($!)
    files+=(--merge "$shard/results.jsonl")
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
tail -n 3 "$out"/shard*.log
echo "mmmamba ablate $table ${files[*]} --out $out"
exit "$status"
