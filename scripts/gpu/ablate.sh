#!/usr/bin/env bash
# A table of `mmmamba ablate` on all GPUs of this machine, several cells at once on each of them.
#
#     scripts/gpu/ablate.sh OUT JOBS nano-ablation --only stages --only placement
#     LIMIT=500 scripts/gpu/ablate.sh OUT JOBS nano-ablation     # stopped after so many seconds; the same command goes on
#
# JOBS cells run at a time on each GPU. Small models do not fill one, but processes take turns on it unless they share it
# through NVIDIA's multi-process service, which this starts where there is one (six cells took 88 s on an H200, and without
# it none had ended after nearly two minutes). One service serves all GPUs. MPS=0 leaves it out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=$1 jobs=$2 table=$3
shift 3
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
mkdir -p "$out"
if [ "$jobs" -gt 1 ] && [ "${MPS:-1}" = 1 ] && command -v nvidia-cuda-mps-control > /dev/null; then
    mkdir -p "$out/mps/pipe" "$out/mps/log"
    export CUDA_MPS_PIPE_DIRECTORY=$(realpath "$out/mps/pipe") CUDA_MPS_LOG_DIRECTORY=$(realpath "$out/mps/log")
    nvidia-cuda-mps-control -d
    trap 'echo quit | timeout 10 nvidia-cuda-mps-control || true' EXIT
fi
count=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')
timeout -k 20 -s INT "${LIMIT:-0}" "$python" -m mmmamba ablate "$table" "$@" --jobs "$((count * jobs))" --out "$out"
