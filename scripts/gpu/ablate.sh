#!/usr/bin/env bash
# A table of `mmmamba ablate` on all GPUs of this machine: a shard for each, several cells at once on each of them.
#
#     scripts/gpu/ablate.sh OUT JOBS nano-ablation --only stages --only placement
#     SECONDS_LEFT=500 scripts/gpu/ablate.sh OUT JOBS nano-ablation        # interrupted then; the same command goes on
#
# JOBS cells run at a time on each GPU. Small models do not fill one, but processes take turns on it unless they share
# it through NVIDIA's multi-process service, which is started here where it is installed (6 cells of nano-ablation at
# once took about half the time on an H200). Results are merged into OUT.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=$1 jobs=$2 table=$3
shift 3
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
mkdir -p "$out"
count=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')
stop() { for pipe in "$out"/mps*/pipe; do [ -d "$pipe" ] && echo quit | CUDA_MPS_PIPE_DIRECTORY=$pipe timeout 10 nvidia-cuda-mps-control || true; done; }
trap stop EXIT
pids=() files=()
for ((gpu = 0; gpu < count; gpu++)); do
    shard=$out/shard$((gpu + 1))
    (
        export CUDA_VISIBLE_DEVICES=$gpu
        if command -v nvidia-cuda-mps-control > /dev/null && [ "$jobs" -gt 1 ]; then
            place=$(realpath "$out")/mps$gpu
            mkdir -p "$place/pipe" "$place/log"
            export CUDA_MPS_PIPE_DIRECTORY=$place/pipe CUDA_MPS_LOG_DIRECTORY=$place/log
            nvidia-cuda-mps-control -d || true  # it runs already
            unset CUDA_VISIBLE_DEVICES          # the service has this one GPU and no other
        fi
        exec timeout -s INT "${SECONDS_LEFT:-infinity}" "$python" -m mmmamba ablate "$table" "$@" \
            --shard "$((gpu + 1))/$count" --jobs "$jobs" --out "$shard" > "$shard.log" 2>&1
    ) &
    pids+=($!)
    files+=(--merge "$shard/results.jsonl")
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
tail -n 3 "$out"/shard*.log
"$python" -m mmmamba ablate "$table" "${files[@]}" --out "$out"
exit "$status"
