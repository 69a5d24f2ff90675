// Attention in true float32: 32 rows a block against 32 rows a step, eight lanes a row.
#pragma once

constexpr int ROWS = 32, LANES = 8, THREADS = ROWS * LANES;
constexpr int MOST = 256 / LANES;    // columns of a lane
constexpr int EACH = ROWS / LANES;   // scores of a lane
constexpr int SCORES = ROWS + 1;     // row stride that keeps columns off the same banks

// Copies 32 rows of `dim` elements to rows of dim + 1; rows from `limit` on are 0.
template <class T>
__device__ __forceinline__ void copy_rows(float* to, const T* from, long long ld, int first, int limit, int dim) {
  for (int i = threadIdx.x; i < ROWS * dim; i += THREADS) {
    int row = i / dim, col = i % dim;
    to[row * (dim + 1) + col] = first + row < limit ? as_f32(from[(first + row) * ld + col]) : 0.0f;
  }
}

__device__ __forceinline__ float dot_rows(const float* a, const float* b, int dim) {
  float sum = 0.0f;
  for (int i = 0; i < dim; ++i) sum = fmaf(a[i], b[i], sum);
  return sum;
}

// sums[j] += weights . rows[.][lane + 8 j]
__device__ __forceinline__ void add_rows(float (&sums)[MOST], const float* weights, const float* rows, int dim,
                                         int lane) {
  for (int i = 0; i < ROWS; ++i) {
    float weight = weights[i];
    const float* row = rows + i * (dim + 1) + lane;
#pragma unroll
    for (int j = 0; j < MOST; ++j) {
      if (lane + j * LANES < dim) sums[j] = fmaf(weight, row[j * LANES], sums[j]);
    }
  }
}

__device__ __forceinline__ void write_row(float* to, const float (&sums)[MOST], float factor, int dim, int lane) {
#pragma unroll
  for (int j = 0; j < MOST; ++j) {
    if (lane + j * LANES < dim) to[lane + j * LANES] = sums[j] * factor;
  }
}

__device__ __forceinline__ float team_sum(float x) {
#pragma unroll
  for (int step = 1; step < LANES; step *= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// A row's softmax goes on over the keys of a step: its scores `s` become exponentials over the greatest score so far,
// which rest in `scores`, times `kept`, and weigh the rows of `values` in `acc`; what was summed before shrinks.
__device__ __forceinline__ void add_softened(float (&acc)[MOST], float& max, float& total, float (&s)[EACH],
                                             const float (&kept)[EACH], float* scores, const float* values, int dim,
                                             int lane) {
  float top = max, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < EACH; ++i) top = fmaxf(top, s[i]);
#pragma unroll
  for (int step = 1; step < LANES; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
  // Rows that have seen nothing so far have no maximum to subtract.
  float factor = max == top ? 1.0f : expf(max - top), low = top == -INFINITY ? 0.0f : top;
  max = top;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    float p = expf(s[i] - low);
    scores[lane + i * LANES] = p * kept[i];
    sum += p;
  }
  total = fmaf(total, factor, team_sum(sum));
#pragma unroll
  for (int j = 0; j < MOST; ++j) acc[j] *= factor;
  __syncwarp();
  add_rows(acc, scores, values, dim, lane);
}
