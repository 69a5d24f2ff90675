#!/bin/sh
# check-faults.sh [DIR]    plants faults in kernels, `FAULT != n`, and fails unless the test named beside each sees it
#
# DIR has what `run-tests.sh build` made; without it that is done here.
set -eu
cd "$(dirname "$0")"
if [ $# -eq 0 ]; then
    set -- "$(mktemp -d)"
    trap 'rm -rf "$1"' EXIT
    ./run-tests.sh build "$1"
fi
xargs -d '\n' -n 1 -P 2 sh -c '
    what=$1
    set -- $1
    [ -x "$0/$1" ] || exit 1  # what does not start notices nothing
    if PHALANX_PLANTED_FAULT=$2 "$0/$1" > /dev/null 2>&1; then
        echo "not caught: $what"
        exit 1
    fi
    echo "caught: $what"' "$1" <<'END'
rows 1 no barrier in the sum over a block
loss 1 no barrier in the sum over a block
optim 1 no barrier in the sum over a block
loss 2 no barrier in the maximum over a block
columns 3 no barrier between warps' column sums and their total
columns 5 no barrier between sums of leaves and their tree
sums 4 no barrier between the search for ids and its use
sums 6 no barrier between the list of tokens and its use
attention 1 values used before they have landed
attention 2 keys overwritten while others read them
attention 3 a query sees one key too many
attention 4 queries of the keys' gradient used before others' have landed
attention 5 keys of the queries' gradient used before they have landed
attention 6 a query does not see its own key
attention_wgmma 7 keys given back before products are done
attention_wgmma 8 values used before they have landed
attention_wgmma 9 queries overwritten while others read them
attention_wgmma 10 keys and values overwritten while others read them
gemm 20 factors used before they have landed
gemm 21 factors given back before products are done
gemm 22 sums used before products are done
gemm 23 factors overwritten while others read them
gemm_leaves 20 leaves used before they have landed
gemm_leaves 21 leaves given back before products are done
gemm_leaves 22 a leaf's sum used before its products are done
gemm_leaves 23 leaves overwritten while others read them
loss 30 a sum of exponentials without its greatest in the squared log-sum-exp
rows 31 elements left out by rows of the launch and not by places in the batch
attention 32 a query sees a key before its window or document
attention 33 a key's gradient has queries that do not see it
attention 35 probabilities left out by sequences of the launch and not by places in the batch
attention 36 probabilities left out by heads at hand and not by those of the model
attention 37 draws of a query not traded between lanes
attention 38 draws of a key not traded between lanes
attention 39 gradients of scores have probabilities that were left out
attention_f32 35 probabilities left out by sequences of the launch and not by places in the batch
columns 34 no barrier between warps' sums of a sink and their total
gemm_f32 24 factors used before others have stored them
muon 40 no barrier between a patch and its transpose
muon 41 weights scaled up where scores are small
experts 50 of experts that are equally good the last
experts 51 no barrier between warps' counts of copies and their sums
experts 52 a token's copies added in another order
grouped 53 factors used before they have landed
grouped 54 factors overwritten while others read them
grouped 55 rows of the next expert written
grouped 56 rows of all ranks meet the levels of the first
contexts 70 a query sees a key too many of another rank
contexts 71 gradients of queries that do not go on with those of earlier hops
contexts 72 copies of a head added in another order
contexts 73 probabilities left out by a rank's rows and not by positions of keys
latent 60 the gradients of the shared part of keys added in another order
latent 61 no barrier between a query among latents and its use
ranks 60 another rank's part added instead of one's own
ranks 61 ranks added one after another
gemm_f32 42 a symmetric product without its mirror image
END
