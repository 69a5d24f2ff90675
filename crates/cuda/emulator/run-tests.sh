#!/bin/sh
# run-tests.sh               builds and runs all tests of kernels in the emulator
# run-tests.sh device DIR    builds them for a GPU (sm_90a, or $ARCH) into DIR, with $NVCC and $NVCC_FLAGS; runs nothing
# run-tests.sh NAME...       the named tests in the emulator; $FLAGS are added, for planted faults (-DFAULT=1)
set -eu
cd "$(dirname "$0")"
if [ "${1:-}" = device ]; then
    out=$2
    mkdir -p "$out"
    ls tests/*.cpp | xargs -P 2 -I{} sh -c '
        "${NVCC:-nvcc}" ${NVCC_FLAGS:-} -x cu -std=c++17 -O2 -arch="${ARCH:-sm_90a}" --cudart static \
            -DPHALANX_ON_DEVICE -o "$0/$(basename {} .cpp)" {}' "$out"
    exit
fi
[ $# -gt 0 ] || set -- $(basename -s .cpp tests/*.cpp)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
printf '%s\n' "$@" | OUT=$out xargs -P 2 -I{} sh -c '
    ${CXX:-g++} -std=c++17 -O2 -DPHALANX_EMULATOR ${FLAGS:-} -o "$OUT/{}" tests/{}.cpp &&
    { "$OUT/{}" > "$OUT/{}.log" 2>&1; status=$?; sed "s/^/{}: /" "$OUT/{}.log"; [ $status -eq 0 ]; }'
