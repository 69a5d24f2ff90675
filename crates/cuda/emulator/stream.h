// What the stand-in libcuda.so.1 offers to the stand-ins of cuBLASLt and NCCL.
#pragma once
#include <cstddef>
#include <functional>

extern "C" {
// Runs the work in the stream's order, or records it; it gives a `CUresult`, and the card is lost if that is an error.
// What waits for other cards must not hold up what a graph has beside it.
int phalanx_emulator_enqueue(void* stream, const std::function<int()>* work, int waits);
// Whether a span lies in a live allocation of a card.
int phalanx_emulator_on_card(const void* p, size_t bytes);
}
