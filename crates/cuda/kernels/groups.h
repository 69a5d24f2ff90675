// How rows are shared out among experts: they lie in the order of (rank that sent them, expert, leaf). Those of one rank
// and expert are a unit.
#pragma once

// Where each unit's rows begin, behind them the end of the last; then the same in tiles of rows.
struct Groups {
  const int* starts;
  int units, experts;

  __device__ __forceinline__ int first(int unit) const { return starts[unit]; }
  __device__ __forceinline__ int end(int unit) const { return starts[unit + 1]; }
  __device__ __forceinline__ int first_tile(int unit) const { return starts[units + 1 + unit]; }
  __device__ __forceinline__ int tiles() const { return first_tile(units); }
  // Whose tile it is: the last unit whose first one is not behind it.
  __device__ __forceinline__ int unit_of(int tile) const {
    int low = 0, high = units;
    while (high - low > 1) {
      int middle = (low + high) / 2;
      if (first_tile(middle) <= tile) low = middle;
      else high = middle;
    }
    return low;
  }
};
