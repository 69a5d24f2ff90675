#!/bin/sh
# run-tests.sh [NAME...]     builds and runs the tests of kernels in the emulator, all or the named ones
# run-tests.sh build DIR     builds all into DIR
# run-tests.sh run DIR       runs what was built there
# run-tests.sh device DIR    builds them for a GPU (sm_90a, or $ARCH) into DIR, with $NVCC and $NVCC_FLAGS; runs nothing
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
build='${CXX:-g++} -std=c++17 -O2 -DPHALANX_EMULATOR -Wno-psabi -o "$OUT/{}" tests/{}.cpp'
run='{ "$OUT/{}" > "$OUT/{}.log" 2>&1; status=$?; sed "s/^/{}: /" "$OUT/{}.log"; [ $status -eq 0 ]; }'
case "${1:-}" in
build) OUT=$2 each=$build ;;
run) OUT=$2 each=$run ;;
*) OUT=$(mktemp -d) each="$build && $run"
    trap 'rm -rf "$OUT"' EXIT ;;
esac
mkdir -p "$OUT"
export OUT
case "${1:-}" in build | run | "") set -- $(basename -s .cpp tests/*.cpp) ;; esac
printf '%s\n' "$@" | xargs -P 2 -I{} sh -c "$each"
