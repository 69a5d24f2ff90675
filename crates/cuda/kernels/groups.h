// How rows are shared out among experts: they lie in the order of (expert, leaf).
#pragma once

// Where each expert's rows begin, behind them the end of the last; then the same in tiles of rows.
struct Groups {
  const int* starts;
  int experts;

  __device__ __forceinline__ int first(int expert) const { return starts[expert]; }
  __device__ __forceinline__ int end(int expert) const { return starts[expert + 1]; }
  __device__ __forceinline__ int first_tile(int expert) const { return starts[experts + 1 + expert]; }
  __device__ __forceinline__ int tiles() const { return first_tile(experts); }
  // Whose tile it is: the last expert whose first one is not behind it.
  __device__ __forceinline__ int expert_of(int tile) const {
    int low = 0, high = experts;
    while (high - low > 1) {
      int middle = (low + high) / 2;
      if (first_tile(middle) <= tile) low = middle;
      else high = middle;
    }
    return low;
  }
};
