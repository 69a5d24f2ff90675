#!/bin/sh
# run-tests.sh               builds and runs all tests of kernels in the emulator
# run-tests.sh device DIR    builds them for a GPU (sm_90a, or $ARCH) into DIR, with $NVCC and $NVCC_FLAGS; runs nothing
# run-tests.sh NAME...       the named tests in the emulator; $FLAGS are added, for planted faults (-DFAULT=1)
set -eu
cd "$(dirname "$0")"
if [ "${1:-}" = device ]; then
    out=$2
    mkdir -p "$out"
    export ARCH="${ARCH:-sm_90a}"  # of machine code alone: what is special to sm_90a is no part of any PTX but its own
    ls tests/*.cpp | xargs -P 2 -I{} sh -c '
        "${NVCC:-nvcc}" ${NVCC_FLAGS:-} -x cu -std=c++17 -O2 -gencode "arch=compute_${ARCH#sm_},code=$ARCH" --cudart static \
            -DPHALANX_ON_DEVICE -o "$0/$(basename {} .cpp)" {}' "$out"
    exit
fi
[ $# -gt 0 ] || set -- $(basename -s .cpp tests/*.cpp)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
printf '%s\n' "$@" | OUT=$out xargs -P 2 -I{} sh -c '
    ${CXX:-g++} -std=c++17 -O2 -DPHALANX_EMULATOR ${FLAGS:-} -o "$OUT/{}" tests/{}.cpp &&
    { "$OUT/{}" > "$OUT/{}.log" 2>&1; status=$?; sed "s/^/{}: /" "$OUT/{}.log"; [ $status -eq 0 ]; }'
