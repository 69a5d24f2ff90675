// Causal attention with grouped queries in true float32, forward and derivative, with the layouts and the order of sums
// of the bf16 kernels: 32 rows a block against 32 rows a step, eight lanes a row. Heads of up to 256 elements: `dim` of
// queries and keys, `value_dim` of values and outputs.
//
//   attention_fwd_f32: grid (ceil(sequence / 32), heads, sequences), 256 threads
//     shared memory: (64 * (dim + 1) + 32 * (value_dim + 1) + 32 * 33) * 4 bytes
//   attention_bwd_prep_f32: grid ceil(tokens * heads / 32), 256 threads; before the other two
//   attention_bwd_dkv_f32: grid (ceil(sequence / 32), kv_heads, sequences), 256 threads
//   attention_bwd_dq_f32: grid (ceil(sequence / 32), heads, sequences), 256 threads
//     shared memory of both: (64 * (dim + 1 + value_dim + 1) + 64 * 33) * 4 bytes
#include "device.h"
#include "sight.h"
#include "attention_rows.h"

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_fwd_f32(const float* __restrict__ qkv, float* __restrict__ o, float* __restrict__ lse, int sequence,
                      int heads, int kv_heads, int dim, int value_dim, float scale, Sight sight) {
  SHARED(float, shared);
  float* queries = shared;
  float* keys = queries + ROWS * (dim + 1);
  float* values = keys + ROWS * (dim + 1);
  float* scores = values + ROWS * (value_dim + 1);
  int block = gridDim.x - 1 - blockIdx.x, head = blockIdx.y;
  int row = threadIdx.x / LANES, lane = threadIdx.x % LANES, first = block * ROWS, position = first + row;
  long long ld = heads * dim + kv_heads * (dim + value_dim), token = (long long)blockIdx.z * sequence;
  int kv_head = head / (heads / kv_heads);
  const float* k = qkv + token * ld + (heads + kv_head) * dim;
  const float* v = qkv + token * ld + (heads + kv_heads) * dim + kv_head * value_dim;
  copy_rows(queries, qkv + token * ld + head * dim, ld, first, sequence, dim);
  float acc[MOST] = {}, max = -INFINITY, total = 0.0f;
  int seen = sight.first(blockIdx.z, sequence, min(position, sequence - 1));
  uint64_t drawn = sight.drops.row(blockIdx.z, head, position);
  for (int key = sight.first(blockIdx.z, sequence, first) / ROWS * ROWS; key <= first; key += ROWS) {
    __syncthreads();
    copy_rows(keys, k, ld, key, sequence, dim);
    copy_rows(values, v, ld, key, sequence, value_dim);
    __syncthreads();
    float s[EACH], kept[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      int at = lane + i * LANES;
      s[i] = dot_rows(queries + row * (dim + 1), keys + at * (dim + 1), dim) * scale;
      if (key + at > position || key + at < seen) s[i] = -INFINITY;
      kept[i] = sight.drops.factor_of(drawn, key + at);
    }
    add_softened(acc, max, total, s, kept, scores + row * SCORES, values, value_dim, lane);
  }
  if (position < sequence) {
    long long at = ((long long)blockIdx.z * heads + head) * sequence + position;
    if (sight.maxima && lane == 0) sight.maxima[at] = max;
    float factor = sight.sinks ? with_sink(max, total, ((const float*)sight.sinks)[head]) : 1.0f;
    write_row(o + ((token + position) * heads + head) * value_dim, acc, factor / total, value_dim, lane);
    if (lane == 0) lse[at] = max + logf(total);
  }
}

// delta[sequence, head, position] = o . d_o, over the rows of a launch, [tokens, heads * dim].
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_bwd_prep_f32(const float* __restrict__ o, const float* __restrict__ d_o, float* __restrict__ delta,
                           int tokens, int sequence, int heads, int dim) {
  long long pair = (long long)blockIdx.x * ROWS + threadIdx.x / LANES;
  int lane = threadIdx.x % LANES;
  bool real = pair < (long long)tokens * heads;
  float sum = 0.0f;
  if (real) {
    for (int col = lane; col < dim; col += LANES) sum = fmaf(o[pair * dim + col], d_o[pair * dim + col], sum);
  }
  sum = team_sum(sum);
  if (real && lane == 0) {
    long long token = pair / heads;
    delta[(token / sequence * heads + pair % heads) * sequence + token % sequence] = sum;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_bwd_dkv_f32(const float* __restrict__ qkv, const float* __restrict__ d_o, const float* __restrict__ lse,
                          const float* __restrict__ delta, float* __restrict__ dqkv, int sequence, int heads,
                          int kv_heads, int dim, int value_dim, float scale, Sight sight) {
  SHARED(float, shared);
  int len = ROWS * (dim + 1), value_len = ROWS * (value_dim + 1);
  float *keys = shared, *values = keys + len, *queries = values + value_len, *grads = queries + len;
  float *weights = grads + value_len, *slopes = weights + ROWS * SCORES;
  int row = threadIdx.x / LANES, lane = threadIdx.x % LANES, first = blockIdx.x * ROWS, group = heads / kv_heads;
  long long ld = heads * dim + kv_heads * (dim + value_dim), o_ld = heads * value_dim;
  long long token = (long long)blockIdx.z * sequence;
  long long own = (heads + blockIdx.y) * dim, own_value = (heads + kv_heads) * dim + blockIdx.y * value_dim;
  copy_rows(keys, qkv + token * ld + own, ld, first, sequence, dim);
  copy_rows(values, qkv + token * ld + own_value, ld, first, sequence, value_dim);
  float dk[MOST] = {}, dv[MOST] = {};
  int end = sight.end(blockIdx.z, sequence, min(first + ROWS, sequence) - 1);
  for (int head = blockIdx.y * group; head < (int)(blockIdx.y + 1) * group; ++head) {
    long long at = ((long long)blockIdx.z * heads + head) * sequence;
    for (int query = first; query < end; query += ROWS) {
      __syncthreads();
      copy_rows(queries, qkv + token * ld + head * dim, ld, query, sequence, dim);
      copy_rows(grads, d_o + token * o_ld + head * value_dim, o_ld, query, sequence, value_dim);
      __syncthreads();
      for (int i = lane; i < ROWS; i += LANES) {
        int position = query + i;
        float p = 0.0f, ds = 0.0f;
        if (position < end && first + row <= position && first + row >= sight.first(blockIdx.z, sequence, position)) {
          float s = dot_rows(queries + i * (dim + 1), keys + row * (dim + 1), dim);
          float kept = sight.drops.factor_of(sight.drops.row(blockIdx.z, head, position), first + row);
          p = expf(s * scale - lse[at + position]);
          float dp = dot_rows(grads + i * (value_dim + 1), values + row * (value_dim + 1), value_dim);
          ds = p * (kept * dp - delta[at + position]);
          p *= kept;
        }
        weights[row * SCORES + i] = p;
        slopes[row * SCORES + i] = ds;
      }
      __syncwarp();
      add_rows(dv, weights + row * SCORES, grads, value_dim, lane);
      add_rows(dk, slopes + row * SCORES, queries, dim, lane);
    }
  }
  if (first + row < sequence) {
    float* to = dqkv + (token + first + row) * ld;
    write_row(to + own, dk, scale, dim, lane);
    write_row(to + own_value, dv, 1.0f, value_dim, lane);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_bwd_dq_f32(const float* __restrict__ qkv, const float* __restrict__ d_o, const float* __restrict__ lse,
                         const float* __restrict__ delta, float* __restrict__ dqkv, int sequence, int heads,
                         int kv_heads, int dim, int value_dim, float scale, Sight sight) {
  SHARED(float, shared);
  int len = ROWS * (dim + 1), value_len = ROWS * (value_dim + 1);
  float *keys = shared, *values = keys + len, *queries = values + value_len, *grads = queries + len;
  float* slopes = grads + value_len;
  int head = blockIdx.y, row = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  int first = (gridDim.x - 1 - blockIdx.x) * ROWS, position = first + row;
  long long ld = heads * dim + kv_heads * (dim + value_dim), o_ld = heads * value_dim;
  long long token = (long long)blockIdx.z * sequence;
  int kv_head = head / (heads / kv_heads);
  const float* k = qkv + token * ld + (heads + kv_head) * dim;
  const float* v = qkv + token * ld + (heads + kv_heads) * dim + kv_head * value_dim;
  copy_rows(queries, qkv + token * ld + head * dim, ld, first, sequence, dim);
  copy_rows(grads, d_o + token * o_ld + head * value_dim, o_ld, first, sequence, value_dim);
  long long at = ((long long)blockIdx.z * heads + head) * sequence + min(position, sequence - 1);
  float log = lse[at], dot = delta[at], dq[MOST] = {};
  uint64_t drawn = sight.drops.row(blockIdx.z, head, position);
  int seen = sight.first(blockIdx.z, sequence, min(position, sequence - 1));
  for (int key = sight.first(blockIdx.z, sequence, first) / ROWS * ROWS; key <= first; key += ROWS) {
    __syncthreads();
    copy_rows(keys, k, ld, key, sequence, dim);
    copy_rows(values, v, ld, key, sequence, value_dim);
    __syncthreads();
    for (int i = lane; i < ROWS; i += LANES) {
      float ds = 0.0f;
      if (key + i <= position && key + i >= seen) {
        float s = dot_rows(queries + row * (dim + 1), keys + i * (dim + 1), dim);
        float dp = dot_rows(grads + row * (value_dim + 1), values + i * (value_dim + 1), value_dim);
        ds = expf(s * scale - log) * (sight.drops.factor_of(drawn, key + i) * dp - dot);
      }
      slopes[row * SCORES + i] = ds;
    }
    __syncwarp();
    add_rows(dq, slopes + row * SCORES, keys, dim, lane);
  }
  if (position < sequence) write_row(dqkv + (token + position) * ld + head * dim, dq, scale, dim, lane);
}
