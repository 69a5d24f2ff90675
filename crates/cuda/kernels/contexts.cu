// Attention over sequences that several ranks hold: keys and values that come part by part around a ring (Liu et al.
// 2023, arXiv 2310.01889), and rows that ranks exchange for all rows of some heads (Jacobs et al. 2023, arXiv
// 2309.14509). In true float32, whatever rows are kept in, with the order of sums of attention_f32.cu. `kv` has rows of
// keys and values alone: kv_heads of `dim`, then of `value_dim`. What is left out at random is that of whole sequences.
//
//   ring_pack_*, ring_end_*, ring_end_dx_*, split_heads_*, join_heads_*: grid rows of what is written, up to 256
//     threads
//   ring_fwd_*: grid (ceil(sequence / 32), heads, sequences), 256 threads
//     shared memory: (64 * (dim + 1) + 32 * (value_dim + 1) + 32 * 33) * 4 bytes
//   ring_dkv_*: grid (ceil(sequence / 32), kv_heads, sequences), ring_dq_*: (ceil(sequence / 32), heads, sequences)
//     shared memory of both: (64 * (dim + 1 + value_dim + 1) + 64 * 33) * 4 bytes; 256 threads
#include "device.h"
#include "attention_rows.h"
#include "dropout.h"

// Widths of a row of qkv.
struct Heads {
  int heads, kv_heads, dim, value_dim;
  __device__ __forceinline__ int queries() const { return heads * dim; }
  __device__ __forceinline__ int keys() const { return kv_heads * dim; }
  __device__ __forceinline__ int kv() const { return kv_heads * (dim + value_dim); }
  __device__ __forceinline__ int packed() const { return queries() + kv(); }
  __device__ __forceinline__ int out() const { return heads * value_dim; }
};

// Whose keys the queries of a rank meet. Rows of a sequence are a piece from its front, `half` of them, and its mirror
// from the back. Queries from row `begin` on see the first `keys` rows of keys; of the rank's own, those up to their
// own row.
struct Part {
  int begin, keys, own, half;
  int front, back;        // where the queries' pieces begin in the sequence
  int of_front, of_back;  // the same of the keys
  int window;             // 0 for all before it
  const uint32_t* starts; // [sequences, sequence]: the position at which a row's document begins; null for 0
  Drops drops;

  // Where the query in a row stands in the sequence, and where the key does.
  __device__ __forceinline__ int position(int row) const { return row < half ? front + row : back + row - half; }
  __device__ __forceinline__ int key_position(int row) const {
    return FAULT == 73 ? row : row < half ? of_front + row : of_back + row - half;
  }
  // Where the draws of the query in a row begin, and what the probability of the key in another is multiplied by.
  __device__ __forceinline__ uint64_t drawn(long long sequence, int head, int row) const {
    return drops.row(sequence, head, position(row));
  }
  __device__ __forceinline__ float kept(uint64_t drawn, int key) const {
    return drops.factor_of(drawn, key_position(key));
  }

  __device__ __forceinline__ int end(int row) const { return own ? min(row + 1, keys) : keys; }
  // The first row of keys that the query in a row sees: never less than that of the row before.
  __device__ __forceinline__ int first(long long sequence, int length, int row) const {
    int low = window > 0 ? max(position(row) + 1 - window, 0) : 0;
    if (starts) low = max(low, (int)starts[sequence * length + row]);
    return min(max(low - of_front, 0), half) + max(low - of_back, 0);
  }
};

template <class T> __device__ __forceinline__ void ring_pack(const T* qkv, T* kv, Heads h) {
  const T* from = qkv + (long long)blockIdx.x * h.packed() + h.queries();
  T* to = kv + (long long)blockIdx.x * h.kv();
  for (int i = (int)threadIdx.x; i < h.kv(); i += (int)blockDim.x) to[i] = from[i];
}

// Goes on with the softmax of a rank's queries over the keys of one rank: `sums` [rows, heads * value_dim], `top` and
// `total` [sequences, heads, sequence]. The rank's own keys begin it, with a sink if there is one.
template <class T>
__device__ __forceinline__ void ring_forward(const T* qkv, const T* kv, const T* sinks, float* sums, float* tops,
                                             float* totals, int sequence, Heads h, float scale, Part part,
                                             float* shared) {
  float* queries = shared;
  float* keys = queries + ROWS * (h.dim + 1);
  float* values = keys + ROWS * (h.dim + 1);
  float* scores = values + ROWS * (h.value_dim + 1);
  int first = (int)(gridDim.x - 1 - blockIdx.x) * ROWS, head = (int)blockIdx.y;
  if (first + ROWS <= part.begin) return;
  int row = (int)threadIdx.x / LANES, lane = (int)threadIdx.x % LANES, at = first + row;
  int kv_head = head / (h.heads / h.kv_heads), last = min(first + ROWS, sequence) - 1;
  long long token = (long long)blockIdx.z * sequence;
  const T *k = kv + token * h.kv() + kv_head * h.dim, *v = kv + token * h.kv() + h.keys() + kv_head * h.value_dim;
  copy_rows(queries, qkv + token * h.packed() + head * h.dim, h.packed(), first, sequence, h.dim);
  bool real = at >= part.begin && at < sequence;
  long long stat = ((long long)blockIdx.z * h.heads + head) * sequence + at;
  float* own = sums + (token + at) * h.out() + head * h.value_dim;
  float acc[MOST] = {}, max = -INFINITY, total = 0.0f;
  if (part.own) {
    if (sinks) max = as_f32(sinks[head]), total = 1.0f;
  } else if (real) {
    max = tops[stat], total = totals[stat];
#pragma unroll
    for (int j = 0; j < MOST; ++j) {
      if (lane + j * LANES < h.value_dim) acc[j] = own[lane + j * LANES];
    }
  }
  int seen = real ? part.first(blockIdx.z, sequence, at) : part.keys, end = real ? part.end(at) : 0;
  int begin = part.first(blockIdx.z, sequence, ::max(first, part.begin)) / ROWS * ROWS;
  uint64_t drawn = part.drawn(blockIdx.z, head, at);
  for (int key = begin; key < part.end(last); key += ROWS) {
    __syncthreads();
    copy_rows(keys, k, h.kv(), key, sequence, h.dim);
    copy_rows(values, v, h.kv(), key, sequence, h.value_dim);
    __syncthreads();
    float s[EACH], kept[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      int j = lane + i * LANES;
      s[i] = dot_rows(queries + row * (h.dim + 1), keys + j * (h.dim + 1), h.dim) * scale;
      if (key + j >= end + (FAULT == 70) || key + j < seen) s[i] = -INFINITY;
      kept[i] = part.kept(drawn, key + j);
    }
    add_softened(acc, max, total, s, kept, scores + row * SCORES, values, h.value_dim, lane);
  }
  if (!real) return;
  write_row(own, acc, 1.0f, h.value_dim, lane);
  if (lane == 0) tops[stat] = max, totals[stat] = total;
}

// Ends a softmax: outputs, and logarithms of denominators in place of the greatest scores, which `maxima` gets if given.
template <class T>
__device__ __forceinline__ void ring_end(const float* sums, const float* totals, float* tops, float* maxima, T* o,
                                         int sequence, Heads h) {
  long long row = blockIdx.x, stats = row / sequence * h.heads * sequence + row % sequence;
  for (int i = (int)threadIdx.x; i < h.out(); i += (int)blockDim.x) {
    float total = totals[stats + (long long)(i / h.value_dim) * sequence];
    put_f32(o + row * h.out() + i, sums[row * h.out() + i] / total);
  }
  for (int head = (int)threadIdx.x; head < h.heads; head += (int)blockDim.x) {
    long long at = stats + (long long)head * sequence;
    float top = tops[at];
    if (maxima) maxima[at] = top;
    tops[at] = top + logf(totals[at]);
  }
}

// The gradients of a rank's keys and values, `dkv`, by the queries at hand: all rows are written.
template <class T>
__device__ __forceinline__ void ring_dkv(const T* qkv, const T* kv, const T* d_o, const float* lse, const float* delta,
                                         float* dkv, int sequence, Heads h, float scale, Part part, float* shared) {
  int len = ROWS * (h.dim + 1), value_len = ROWS * (h.value_dim + 1);
  float *keys = shared, *values = keys + len, *queries = values + value_len, *grads = queries + len;
  float *weights = grads + value_len, *slopes = weights + ROWS * SCORES;
  int row = (int)threadIdx.x / LANES, lane = (int)threadIdx.x % LANES, first = (int)blockIdx.x * ROWS;
  int key = first + row;
  int group = h.heads / h.kv_heads;
  long long token = (long long)blockIdx.z * sequence;
  long long own = blockIdx.y * h.dim, own_value = h.keys() + blockIdx.y * h.value_dim;
  copy_rows(keys, kv + token * h.kv() + own, h.kv(), first, sequence, h.dim);
  copy_rows(values, kv + token * h.kv() + own_value, h.kv(), first, sequence, h.value_dim);
  float dk[MOST] = {}, dv[MOST] = {};
  int begin = part.own ? max(part.begin, first) : part.begin;
  if (first >= part.keys) begin = sequence;
  for (int head = blockIdx.y * group; head < (int)(blockIdx.y + 1) * group; ++head) {
    long long at = ((long long)blockIdx.z * h.heads + head) * sequence;
    for (int query = begin / ROWS * ROWS; query < sequence; query += ROWS) {
      // Queries further on see no key before theirs.
      if (part.first(blockIdx.z, sequence, max(query, part.begin)) >= first + ROWS) break;
      __syncthreads();
      copy_rows(queries, qkv + token * h.packed() + head * h.dim, h.packed(), query, sequence, h.dim);
      copy_rows(grads, d_o + token * h.out() + head * h.value_dim, h.out(), query, sequence, h.value_dim);
      __syncthreads();
      for (int i = lane; i < ROWS; i += LANES) {
        int q = query + i;
        float p = 0.0f, ds = 0.0f;
        if (q >= part.begin && q < sequence && key < part.end(q) && key >= part.first(blockIdx.z, sequence, q)) {
          float s = dot_rows(queries + i * (h.dim + 1), keys + row * (h.dim + 1), h.dim);
          float kept = part.kept(part.drawn(blockIdx.z, head, q), key);
          p = expf(s * scale - lse[at + q]);
          float dp = dot_rows(grads + i * (h.value_dim + 1), values + row * (h.value_dim + 1), h.value_dim);
          ds = p * (kept * dp - delta[at + q]);
          p *= kept;
        }
        weights[row * SCORES + i] = p;
        slopes[row * SCORES + i] = ds;
      }
      __syncwarp();
      add_rows(dv, weights + row * SCORES, grads, h.value_dim, lane);
      add_rows(dk, slopes + row * SCORES, queries, h.dim, lane);
    }
  }
  if (key < sequence) {
    float* to = dkv + (token + key) * h.kv();
    write_row(to + own, dk, scale, h.dim, lane);
    write_row(to + own_value, dv, 1.0f, h.value_dim, lane);
  }
}

// Adds to the gradients of scaled queries, `dq` [rows, heads * dim]; with a rank's own keys they are new.
template <class T>
__device__ __forceinline__ void ring_dq(const T* qkv, const T* kv, const T* d_o, const float* lse, const float* delta,
                                        float* dq, int sequence, Heads h, float scale, Part part, float* shared) {
  int len = ROWS * (h.dim + 1), value_len = ROWS * (h.value_dim + 1);
  float *keys = shared, *values = keys + len, *queries = values + value_len, *grads = queries + len;
  float* slopes = grads + value_len;
  int head = (int)blockIdx.y, row = (int)threadIdx.x / LANES, lane = (int)threadIdx.x % LANES;
  int first = (int)(gridDim.x - 1 - blockIdx.x) * ROWS, at = first + row;
  if (first + ROWS <= part.begin) return;
  int kv_head = head / (h.heads / h.kv_heads), last = min(first + ROWS, sequence) - 1;
  long long token = (long long)blockIdx.z * sequence;
  const T *k = kv + token * h.kv() + kv_head * h.dim, *v = kv + token * h.kv() + h.keys() + kv_head * h.value_dim;
  copy_rows(queries, qkv + token * h.packed() + head * h.dim, h.packed(), first, sequence, h.dim);
  copy_rows(grads, d_o + token * h.out() + head * h.value_dim, h.out(), first, sequence, h.value_dim);
  bool real = at >= part.begin && at < sequence;
  long long stat = ((long long)blockIdx.z * h.heads + head) * sequence + min(at, sequence - 1);
  float* own = dq + (token + at) * h.queries() + head * h.dim;
  float log = lse[stat], dot = delta[stat], sums[MOST] = {};
  if (real && !part.own && FAULT != 71) {
#pragma unroll
    for (int j = 0; j < MOST; ++j) {
      if (lane + j * LANES < h.dim) sums[j] = own[lane + j * LANES];
    }
  }
  int seen = real ? part.first(blockIdx.z, sequence, at) : part.keys, end = real ? part.end(at) : 0;
  int begin = part.first(blockIdx.z, sequence, max(first, part.begin)) / ROWS * ROWS;
  uint64_t drawn = part.drawn(blockIdx.z, head, at);
  for (int key = begin; key < part.end(last); key += ROWS) {
    __syncthreads();
    copy_rows(keys, k, h.kv(), key, sequence, h.dim);
    copy_rows(values, v, h.kv(), key, sequence, h.value_dim);
    __syncthreads();
    for (int i = lane; i < ROWS; i += LANES) {
      float ds = 0.0f;
      if (key + i < end && key + i >= seen) {
        float s = dot_rows(queries + row * (h.dim + 1), keys + i * (h.dim + 1), h.dim);
        float dp = dot_rows(grads + row * (h.value_dim + 1), values + i * (h.value_dim + 1), h.value_dim);
        ds = expf(s * scale - log) * (part.kept(drawn, key + i) * dp - dot);
      }
      slopes[row * SCORES + i] = ds;
    }
    __syncwarp();
    add_rows(sums, slopes + row * SCORES, keys, h.dim, lane);
  }
  if (real) write_row(own, sums, 1.0f, h.dim, lane);
}

// Packs gradients of queries, of keys and of values.
template <class T>
__device__ __forceinline__ void ring_end_dx(const float* dq, const float* dkv, T* dqkv, float scale, Heads h) {
  long long row = blockIdx.x;
  for (int i = (int)threadIdx.x; i < h.packed(); i += (int)blockDim.x) {
    bool query = i < h.queries();
    float x = query ? dq[row * h.queries() + i] * scale : dkv[row * h.kv() + i - h.queries()];
    put_f32(dqkv + row * h.packed() + i, x);
  }
}

// Queries (0), keys (1) or values (2) of a packed row, and their share of a rank's. Where key and value heads are fewer
// than ranks, `copies` ranks in a row have the same ones.
struct Section {
  int from, to, len, copies;
  __device__ __forceinline__ Section(const Heads& h, int ranks, int which) {
    copies = which > 0 && h.kv_heads > 0 && h.kv_heads < ranks ? ranks / h.kv_heads : 1;
    int query_len = h.heads / ranks * h.dim, heads = which > 0 ? h.kv_heads : h.heads;
    len = heads * copies / ranks * (which == 2 ? h.value_dim : h.dim);
    from = which == 0 ? 0 : h.queries() + (which == 2 ? h.keys() : 0);
    to = which == 0 ? 0 : query_len + (which == 2 ? h.kv_heads * copies / ranks * h.dim : 0);
  }
};

// Which section an element of a packed row is of.
__device__ __forceinline__ int section_of(const Heads& h, int at) {
  return at < h.queries() ? 0 : at < h.queries() + h.keys() ? 1 : 2;
}

// Rows [sequences, sequence, packed] to parts [sequences, ranks, sequence, width]: of each sequence its rows for every rank
// in turn, each with that rank's heads.
template <class T>
__device__ __forceinline__ void split_heads(const T* rows, T* parts, int sequence, int width, int ranks, Heads h) {
  long long row = blockIdx.x, run = row / sequence, at = row % sequence;
  int rank = (int)(run % ranks);
  const T* from = rows + (run / ranks * sequence + at) * h.packed();
#pragma unroll
  for (int which = 0; which < 3; ++which) {
    Section s(h, ranks, which);
    for (int i = (int)threadIdx.x; i < s.len; i += (int)blockDim.x) {
      parts[row * width + s.to + i] = from[s.from + rank / s.copies * s.len + i];
    }
  }
}

// Back: of heads that several ranks have copies of the sum, in the order of the ranks.
template <class T>
__device__ __forceinline__ void join_heads(const T* parts, T* rows, int sequence, int width, int ranks, Heads h) {
  long long row = blockIdx.x, run = row / sequence * ranks, at = row % sequence;
  for (int i = (int)threadIdx.x; i < h.packed(); i += (int)blockDim.x) {
    Section s(h, ranks, section_of(h, i));
    int rank = (i - s.from) / s.len * s.copies;
    const T* from = parts + ((run + rank) * sequence + at) * width + s.to + (i - s.from) % s.len;
    float sum = as_f32(*from);
    for (int copy = 1; copy < s.copies; ++copy) {
      int other = FAULT == 72 ? s.copies - copy : copy;
      sum += as_f32(from[(long long)other * sequence * width]);
    }
    put_f32(rows + row * h.packed() + i, sum);
  }
}

#define CONTEXT_KERNELS(T, S)                                                                                         \
  extern "C" __global__ void __launch_bounds__(THREADS) ring_pack_##S(const T* qkv, T* kv, Heads h) {                 \
    ring_pack(qkv, kv, h);                                                                                            \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                               \
      ring_fwd_##S(const T* qkv, const T* kv, const T* sinks, float* sums, float* tops, float* totals, int sequence,  \
                   Heads h, float scale, Part part) {                                                                 \
    SHARED(float, shared);                                                                                            \
    ring_forward(qkv, kv, sinks, sums, tops, totals, sequence, h, scale, part, shared);                               \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                               \
      ring_end_##S(const float* sums, const float* totals, float* tops, float* maxima, T* o, int sequence, Heads h) { \
    ring_end(sums, totals, tops, maxima, o, sequence, h);                                                             \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                               \
      ring_dkv_##S(const T* qkv, const T* kv, const T* d_o, const float* lse, const float* delta, float* dkv,         \
                   int sequence, Heads h, float scale, Part part) {                                                   \
    SHARED(float, shared);                                                                                            \
    ring_dkv(qkv, kv, d_o, lse, delta, dkv, sequence, h, scale, part, shared);                                        \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                               \
      ring_dq_##S(const T* qkv, const T* kv, const T* d_o, const float* lse, const float* delta, float* dq,           \
                  int sequence, Heads h, float scale, Part part) {                                                    \
    SHARED(float, shared);                                                                                            \
    ring_dq(qkv, kv, d_o, lse, delta, dq, sequence, h, scale, part, shared);                                          \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                               \
      ring_end_dx_##S(const float* dq, const float* dkv, T* dqkv, float scale, Heads h) {                             \
    ring_end_dx(dq, dkv, dqkv, scale, h);                                                                             \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                               \
      split_heads_##S(const T* rows, T* parts, int sequence, int width, int ranks, Heads h) {                         \
    split_heads(rows, parts, sequence, width, ranks, h);                                                              \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                               \
      join_heads_##S(const T* parts, T* rows, int sequence, int width, int ranks, Heads h) {                          \
    join_heads(parts, rows, sequence, width, ranks, h);                                                               \
  }
CONTEXT_KERNELS(bf16, bf16)
CONTEXT_KERNELS(float, f32)
