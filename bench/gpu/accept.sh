#!/bin/sh
# Holds the CUDA device of Phalanx to its promises on this machine's GPU, in at most 8 minutes; nothing is installed.
#
#   bench/gpu/accept.sh PHALANX [PROGRAMS] [--only STAGE,...] [--minutes 8]
#
# PHALANX is the built binary. PROGRAMS is a folder of what was built beforehand: kernels/ (tests of kernels), rust/ (test
# binaries of cargo) and bench/ (programs that print rates as lines of JSON); what is missing is skipped with a reason.
# Results go to $OUT (default ./gpu-results): accept.json, accept.log, accept.txt. $PYTHON is a Python with PyTorch.
#
# A rehearsal without a GPU, on tiny models:
#   ACCEPT_DEVICE=cpu ACCEPT_REHEARSE=1 bench/gpu/accept.sh target/release/phalanx
exec "${PYTHON:-python3}" -u "$(dirname "$0")/accept.py" "$@"
