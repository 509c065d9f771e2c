#!/bin/sh
# The kernels' tests under NVIDIA's compute-sanitizer: bad memory accesses, then races in shared memory.
#
#     sh scripts/gpu/sanitize.sh                 # both tools
#     sh scripts/gpu/sanitize.sh racecheck       # one of them
#     TESTS="tests/ops/gated_delta tests/ops/squared_error" sh scripts/gpu/sanitize.sh
#
# What racecheck says of NVIDIA's own matrix products (nvjet) does not count: it does not follow their asynchronous copies.
# The tests run once without a tool, so that every kernel is compiled; then PyTorch's memory cache is off, in which an
# access beyond a tensor could hide. No graph can be captured then, so the tests that capture one are left out. Long rows, the
# full size, and what torch.compile makes, take too long there.
set -eu
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD/src:$PWD/tests:${PYTHONPATH:-}"
tests="python3 -m pytest -q -m gpu -p no:cacheprovider ${TESTS:-tests/ops}"
without="not long_rows and not full_size and not compiled and not chain_of_launches and not captured"
command -v compute-sanitizer > /dev/null || { echo "compute-sanitizer (part of the CUDA toolkit) is not on the path" >&2; exit 2; }
$tests -k "$without"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for tool in ${*:-memcheck racecheck}; do
    echo "== $tool"
    status=0
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" $tests -k "$without" > "$log" 2>&1 || status=$?
    cat "$log"
    [ "$status" -eq 0 ] || exit "$status"
    # Every finding begins with "Error:" or "Invalid …"; those of races name the kernel in the same line.
    if grep -E "^=+ (Error|Warning|Invalid|Program hit)" "$log" | grep -v "nvjet"; then
        echo "$tool: the above" >&2
        exit 9
    fi
done
