// What bounds the keys that a query sees beside its own position, what else its softmax sums, and what it leaves out.
#pragma once
#include "dropout.h"

struct Sight {
  int window;              // keys that a query sees, its own the last of them; 0 for all before it
  const uint32_t* starts;  // [sequences, sequence]: the position at which a row's document begins; null for 0
  const void* sinks;       // a score for each query head, of the type of qkv; null for none
  float* maxima;           // [sequences, heads, sequence]: gets each row's greatest score; null if nobody asks
  Drops drops;

  // The first key that the query at a position sees: never less than that of the position before.
  __device__ __forceinline__ int first(long long sequence, int length, int position) const {
    int key = window > 0 ? max(position + 1 - window, 0) : 0;
    return starts ? max(key, (int)starts[sequence * length + position]) : key;
  }
  // Of the positions up to `length` the first whose query does not see `key`, nor any before it.
  __device__ __forceinline__ int end(long long sequence, int length, int key) const {
    int low = key + 1, high = length;
    while (low < high) {
      int middle = (low + high) / 2;
      if (first(sequence, length, middle) > key) high = middle;
      else low = middle + 1;
    }
    return low;
  }
};
// A softmax whose exponentials over `top` add up to `total` sums a sink as well: gives what those exponentials are to be
// multiplied by over the new `top`.
__device__ __forceinline__ float with_sink(float& top, float& total, float sink) {
  float most = fmaxf(top, sink), factor = expf(top - most);
  total = fmaf(total, factor, expf(sink - most));
  top = most;
  return factor;
}

// Everything before it.
constexpr Sight ALL_BEFORE = {0, nullptr, nullptr, nullptr, NO_DROPS};
