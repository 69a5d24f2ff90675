#!/bin/sh
# run.sh OUTDIR    builds the stand-in libraries and their test into OUTDIR, and runs the test
set -eu
cd "$(dirname "$0")"
KERNELS="selftest/unit.cu" ../build.sh "$1"
${CXX:-g++} -std=c++17 -O1 -pthread -o "$1/selftest" selftest.cpp -ldl
timeout 300 "$1/selftest" "$1"
