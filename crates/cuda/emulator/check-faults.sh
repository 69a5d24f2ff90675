#!/bin/sh
# Plants faults in kernels, `#if FAULT != n`, and fails unless the test named beside each sees it.
set -u
cd "$(dirname "$0")"
status=0
while read -r test fault what; do
    if FLAGS="-DFAULT=$fault" ./run-tests.sh "$test" > /dev/null 2>&1; then
        echo "not caught: $test, fault $fault: $what"
        status=1
    else
        echo "caught: $test, fault $fault: $what"
    fi
done <<'END'
rows 1 no barrier in the sum over a block
loss 1 no barrier in the sum over a block
optim 1 no barrier in the sum over a block
loss 2 no barrier in the maximum over a block
rows 3 no barrier between warps' column sums and their total
sums 4 no barrier between the search for ids and its use
END
exit $status
