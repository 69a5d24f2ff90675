// Norms, rotations and other work on rows, as the host's CPU kernels define it.
//
//   by row (embed, rms_norm*, layer_norm*, qk_norm, qk_norm_dx, rope): grid rows, a block of 32 to 256 threads (a
//     multiple of 32) that follows from the row's length alone, since the order of sums follows from it
// No dynamic shared memory. Rows are read and written 16 bytes at a time where they are aligned and `dim` (half of it
// for rope) is a multiple of 8.
#include "device.h"
#include "dropout.h"
#include "lanes.h"

constexpr int MOST_THREADS = 256;

// Of a sequence's rows the first half lie from position `front` on, the others from `back` on.
template <class T>
__device__ __forceinline__ void embed(const uint32_t* ids, const T* table, const T* positions, T* out, int vocab0,
                                      int rows, int sequence, int front, int back, int dim) {
  int t = (int)blockIdx.x, at_row = t % sequence, half = sequence / 2;
  uint32_t id = ids[t] - (uint32_t)vocab0;
  const T* word = id < (uint32_t)rows ? table + (long long)id * dim : nullptr;
  long long position = at_row < half ? front + at_row : back + at_row - half;
  const T* place = positions ? positions + position * dim : nullptr;
  T* to = out + (long long)t * dim;
  bool wide = dim % 8 == 0 && aligned16(table) && aligned16(out) && (!positions || aligned16(positions));
  for (int at = (int)threadIdx.x * 8; at < dim; at += (int)blockDim.x * 8) {
    float v[8] = {0, 0, 0, 0, 0, 0, 0, 0}, p[8];
    if (word) get8(word, at, dim, wide).unpack(v);
    if (place) {
      get8(place, at, dim, wide).unpack(p);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] += p[i];
    }
    put8(to, at, dim, wide, v);
  }
}

// A row that a thread holds in K groups of eight; with K = 0 the row is too long and is read again.
template <class T, int K> struct Row {
  static constexpr bool KEPT = K > 0;
  Eight<T> kept[KEPT ? K : 1];
  __device__ __forceinline__ void fetch(const T* row, int dim, bool wide) {
    if (KEPT) {
#pragma unroll
      for (int k = 0; k < K; ++k) kept[k] = get8(row, (k * (int)blockDim.x + (int)threadIdx.x) * 8, dim, wide);
    }
  }
  __device__ __forceinline__ void part(float (&v)[8], const T* row, int k, int dim, bool wide) const {
    if (KEPT) kept[k].unpack(v);
    else get8(row, (k * (int)blockDim.x + (int)threadIdx.x) * 8, dim, wide).unpack(v);
  }
};

// Weights come from the second-level cache: they are held from before the barrier only where there is room.
template <class T, int K> using Weights = Row<T, (K <= 2 ? K : 0)>;

// Groups of eight that a thread has of a row.
__device__ __forceinline__ int groups(int dim) { return (dim + 8 * (int)blockDim.x - 1) / (8 * (int)blockDim.x); }

#define EACH_GROUP(K, dim)                                                                                   \
  _Pragma("unroll") for (int k = 0, at = (int)threadIdx.x * 8; k < ((K) > 0 ? (K) : groups(dim));            \
                         ++k, at += (int)blockDim.x * 8)

// Calls BODY<T, K> with as many groups as the row has.
#define BY_LENGTH(T, BODY, dim, ...)                  \
  do {                                                \
    int count = groups(dim);                          \
    if (count == 1) BODY<T, 1>(__VA_ARGS__);          \
    else if (count == 2) BODY<T, 2>(__VA_ARGS__);     \
    else if (count <= 4) BODY<T, 4>(__VA_ARGS__);     \
    else BODY<T, 0>(__VA_ARGS__);                     \
  } while (0)

// Within 2 ulp, as rsqrtf is: exact division and roots are calls, which cost a row's registers, and a sum in f32 is no
// nearer.
__device__ __forceinline__ float mean_of(float sum, int dim) { return __fdividef(sum, (float)dim); }

template <class T, int K>
__device__ __forceinline__ void rms_norm(const T* x, const T* w, T* y, float* rstd, int dim, float eps, bool wide,
                                         float* slots) {
  x += (long long)blockIdx.x * dim;
  y += (long long)blockIdx.x * dim;
  Row<T, K> row;
  Weights<T, K> weight;
  row.fetch(x, dim, wide);
  weight.fetch(w, dim, wide);
  float squares = 0, v[8], g[8];
  EACH_GROUP(K, dim) {
    row.part(v, x, k, dim, wide);
#pragma unroll
    for (int i = 0; i < 8; ++i) squares = fmaf(v[i], v[i], squares);
  }
  float r = rsqrtf(mean_of(block_sum(squares, slots), dim) + eps);
  if (threadIdx.x == 0) rstd[blockIdx.x] = r;
  EACH_GROUP(K, dim) {
    row.part(v, x, k, dim, wide);
    weight.part(g, w, k, dim, wide);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = v[i] * r * g[i];
    put8(y, at, dim, wide, v);
  }
}

template <class T, int K>
__device__ __forceinline__ void layer_norm(const T* x, const T* w, const T* b, T* y, float* stats, int n, int dim,
                                           float eps, bool wide, float* slots) {
  x += (long long)blockIdx.x * dim;
  y += (long long)blockIdx.x * dim;
  Row<T, K> row;
  Weights<T, K> weight, bias;
  row.fetch(x, dim, wide);
  weight.fetch(w, dim, wide);
  bias.fetch(b, dim, wide);
  float sum = 0, squares = 0, v[8], g[8], c[8];
  EACH_GROUP(K, dim) {
    row.part(v, x, k, dim, wide);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += v[i];
  }
  float mean = mean_of(block_sum(sum, slots), dim);
  EACH_GROUP(K, dim) {
    row.part(v, x, k, dim, wide);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float d = at + i < dim ? v[i] - mean : 0.0f;
      squares = fmaf(d, d, squares);
    }
  }
  float r = rsqrtf(mean_of(block_sum(squares, slots + 32), dim) + eps);
  if (threadIdx.x == 0) {
    stats[blockIdx.x] = mean;
    stats[(long long)n + blockIdx.x] = r;
  }
  EACH_GROUP(K, dim) {
    row.part(v, x, k, dim, wide);
    weight.part(g, w, k, dim, wide);
    bias.part(c, b, k, dim, wide);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = fmaf((v[i] - mean) * r, g[i], c[i]);
    put8(y, at, dim, wide, v);
  }
}

// The gradient of either norm's input; without `LAYER` the mean is 0 and stays out.
template <class T, int K, bool LAYER>
__device__ __forceinline__ void norm_dx(const T* dy, const T* x, const T* w, float mean, float r, const T* acc, T* dx,
                                        int dim, bool wide, float* slots) {
  long long from = (long long)blockIdx.x * dim;
  dy += from, x += from, dx += from;
  if (acc) acc += from;
  Row<T, K> gradient, row;
  Weights<T, K> weight;
  gradient.fetch(dy, dim, wide);
  row.fetch(x, dim, wide);
  weight.fetch(w, dim, wide);
  float sum = 0, dot = 0, g[8], v[8], c[8];
  EACH_GROUP(K, dim) {
    gradient.part(g, dy, k, dim, wide);
    row.part(v, x, k, dim, wide);
    weight.part(c, w, k, dim, wide);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float slope = g[i] * c[i];
      sum += slope;
      dot = fmaf(slope, LAYER ? (v[i] - mean) * r : v[i], dot);
    }
  }
  float mean_dot = mean_of(block_sum(dot, slots), dim);
  float mean_slope = LAYER ? mean_of(block_sum(sum, slots + 32), dim) : 0.0f;
  float back = LAYER ? -mean_dot : -(r * r * mean_dot);
  EACH_GROUP(K, dim) {
    gradient.part(g, dy, k, dim, wide);
    row.part(v, x, k, dim, wide);
    weight.part(c, w, k, dim, wide);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float slope = g[i] * c[i];
      v[i] = (LAYER ? fmaf((v[i] - mean) * r, back, slope - mean_slope) : fmaf(v[i], back, slope)) * r;
    }
    if (acc) {
      get8(acc, at, dim, wide).unpack(g);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] += g[i];
    }
    put8(dx, at, dim, wide, v);
  }
}
template <class T, int K>
__device__ __forceinline__ void rms_norm_dx(const T* dy, const T* x, const T* w, const float* rstd, const T* acc, T* dx,
                                            int dim, bool wide, float* slots) {
  norm_dx<T, K, false>(dy, x, w, 0.0f, rstd[blockIdx.x], acc, dx, dim, wide, slots);
}
template <class T, int K>
__device__ __forceinline__ void layer_norm_dx(const T* dy, const T* x, const T* w, const float* stats, const T* acc,
                                              T* dx, int n, int dim, bool wide, float* slots) {
  norm_dx<T, K, true>(dy, x, w, stats[blockIdx.x], stats[(long long)n + blockIdx.x], acc, dx, dim, wide, slots);
}

// Packed rows of qkv: as many lanes as a head needs, a power of two, take it together.
struct HeadLanes {
  int lanes, groups, group, at;
  __device__ __forceinline__ explicit HeadLanes(int dim) {
    lanes = 1;
    while (lanes < 32 && lanes * 8 < dim) lanes *= 2;
    groups = (int)blockDim.x / lanes;
    group = (int)threadIdx.x / lanes;
    at = (int)threadIdx.x % lanes * 8;
  }
  __device__ __forceinline__ float sum(float x) const {
    for (int bits = lanes / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(~0u, x, bits);
    return x;
  }
};

template <class T>
__device__ __forceinline__ void qk_norm(const T* qkv, const T* wq, const T* wk, T* out, float* rstd, int heads,
                                        int kv_heads, int dim, float eps) {
  int normed = heads + kv_heads, all = normed + kv_heads;
  long long from = (long long)blockIdx.x * all * dim;
  bool wide = dim % 8 == 0 && aligned16(qkv) && aligned16(wq) && aligned16(wk) && aligned16(out);
  HeadLanes l(dim);
  for (int first = 0; first < all; first += l.groups) {
    int head = first + l.group;
    bool mine = head < all;
    const T* x = qkv + from + (long long)(mine ? head : 0) * dim;
    T* y = out + from + (long long)head * dim;
    const T* w = head < heads ? wq : wk;
    Eight<T> kept = get8(x, l.at, dim, wide);
    float squares = 0, v[8], g[8];
    for (int at = l.at; at < dim; at += l.lanes * 8) {
      (at == l.at ? kept : get8(x, at, dim, wide)).unpack(v);
#pragma unroll
      for (int i = 0; i < 8; ++i) squares = fmaf(v[i], v[i], squares);
    }
    float r = rsqrtf(mean_of(l.sum(squares), dim) + eps);
    if (!mine) continue;
    if (head < normed && l.at == 0) rstd[(long long)blockIdx.x * normed + head] = r;
    for (int at = l.at; at < dim; at += l.lanes * 8) {
      (at == l.at ? kept : get8(x, at, dim, wide)).unpack(v);
      if (head < normed) {
        get8(w, at, dim, wide).unpack(g);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = v[i] * r * g[i];
      }
      put8(y, at, dim, wide, v);
    }
  }
}

template <class T>
__device__ __forceinline__ void qk_norm_dx(const T* dy, const T* qkv, const T* wq, const T* wk, const float* rstd,
                                           T* dqkv, int heads, int kv_heads, int dim) {
  int normed = heads + kv_heads, all = normed + kv_heads;
  long long from = (long long)blockIdx.x * all * dim;
  bool wide = dim % 8 == 0 && aligned16(qkv) && aligned16(wq) && aligned16(wk) && aligned16(dy) && aligned16(dqkv);
  HeadLanes l(dim);
  for (int first = 0; first < all; first += l.groups) {
    int head = first + l.group;
    bool mine = head < all;
    long long start = from + (long long)(mine ? head : 0) * dim;
    const T* w = head < heads ? wq : wk;
    Eight<T> kept_x = get8(qkv + start, l.at, dim, wide), kept_dy = get8(dy + start, l.at, dim, wide);
    float dot = 0, v[8], g[8], c[8];
    for (int at = l.at; at < dim; at += l.lanes * 8) {
      (at == l.at ? kept_x : get8(qkv + start, at, dim, wide)).unpack(v);
      (at == l.at ? kept_dy : get8(dy + start, at, dim, wide)).unpack(g);
      get8(w, at, dim, wide).unpack(c);
#pragma unroll
      for (int i = 0; i < 8; ++i) dot = fmaf(g[i] * c[i], v[i], dot);
    }
    float mean_dot = mean_of(l.sum(dot), dim);
    if (!mine) continue;
    float r = head < normed ? rstd[(long long)blockIdx.x * normed + head] : 0.0f, back = -(r * r * mean_dot);
    for (int at = l.at; at < dim; at += l.lanes * 8) {
      (at == l.at ? kept_dy : get8(dy + start, at, dim, wide)).unpack(g);
      if (head < normed) {
        (at == l.at ? kept_x : get8(qkv + start, at, dim, wide)).unpack(v);
        get8(w, at, dim, wide).unpack(c);
#pragma unroll
        for (int i = 0; i < 8; ++i) g[i] = fmaf(v[i], back, g[i] * c[i]) * r;
      }
      put8(dqkv + start, at, dim, wide, g);
    }
  }
}

// Element j of a head's first half pairs with element j of the second.
template <class T>
__device__ __forceinline__ void rope(T* qkv, const float* cosines, const float* sines, int sequence, int heads,
                                     int kv_heads, int dim, int position0, int inverse) {
  int half = dim / 2, groups = (half + 7) / 8, total = (heads + kv_heads) * groups;
  long long position = position0 + (int)blockIdx.x % sequence;
  const float* cosine = cosines + position * half;
  const float* sine = sines + position * half;
  T* row = qkv + (long long)blockIdx.x * (heads + 2 * kv_heads) * dim;
  bool wide = half % 8 == 0 && aligned16(qkv) && aligned16(cosines) && aligned16(sines);
#pragma unroll 2
  for (int i = (int)threadIdx.x; i < total; i += (int)blockDim.x) {
    int at = i % groups * 8;
    T* low = row + i / groups * dim;
    T* high = low + half;
    float a[8], b[8], c[8], s[8];
    get8(low, at, half, wide).unpack(a);
    get8(high, at, half, wide).unpack(b);
    get8(cosine, at, half, wide).unpack(c);
    get8(sine, at, half, wide).unpack(s);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float turn = inverse ? -s[j] : s[j], x = a[j], y = b[j];
      a[j] = x * c[j] - y * turn;
      b[j] = fmaf(y, c[j], x * turn);
    }
    put8(low, at, half, wide, a);
    put8(high, at, half, wide, b);
  }
}

#define WIDE2(a, b) (dim % 8 == 0 && aligned16(a) && aligned16(b))
#define ROW_KERNELS(T, S)                                                                                             \
  extern "C" __global__ void __launch_bounds__(MOST_THREADS)                                                          \
      embed_##S(const uint32_t* ids, const T* table, const T* positions, T* out, int vocab0, int rows, int sequence,  \
                int front, int back, int dim) {                                                                       \
    embed(ids, table, positions, out, vocab0, rows, sequence, front, back, dim);                                      \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(MOST_THREADS)                                                          \
      rms_norm_##S(const T* x, const T* w, T* y, float* rstd, int dim, float eps) {                                   \
    SHARED_ARRAY(float, slots, 32);                                                                                   \
    BY_LENGTH(T, rms_norm, dim, x, w, y, rstd, dim, eps, WIDE2(x, w) && aligned16(y), slots);                         \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(MOST_THREADS)                                                          \
      layer_norm_##S(const T* x, const T* w, const T* b, T* y, float* stats, int n, int dim, float eps) {             \
    SHARED_ARRAY(float, slots, 64);                                                                                   \
    bool wide = WIDE2(x, w) && aligned16(b) && aligned16(y);                                                          \
    BY_LENGTH(T, layer_norm, dim, x, w, b, y, stats, n, dim, eps, wide, slots);                                       \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(MOST_THREADS)                                                          \
      rms_norm_dx_##S(const T* dy, const T* x, const T* w, const float* rstd, const T* acc, T* dx, int dim) {         \
    SHARED_ARRAY(float, slots, 64);                                                                                   \
    bool wide = WIDE2(x, w) && WIDE2(dy, dx) && aligned16(acc);                                                       \
    BY_LENGTH(T, rms_norm_dx, dim, dy, x, w, rstd, acc, dx, dim, wide, slots);                                        \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(MOST_THREADS)                                                          \
      layer_norm_dx_##S(const T* dy, const T* x, const T* w, const float* stats, const T* acc, T* dx, int n,          \
                        int dim) {                                                                                    \
    SHARED_ARRAY(float, slots, 64);                                                                                   \
    bool wide = WIDE2(x, w) && WIDE2(dy, dx) && aligned16(acc);                                                       \
    BY_LENGTH(T, layer_norm_dx, dim, dy, x, w, stats, acc, dx, n, dim, wide, slots);                                  \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(MOST_THREADS, 4)                                                       \
      qk_norm_##S(const T* qkv, const T* wq, const T* wk, T* out, float* rstd, int heads, int kv_heads, int dim,      \
                  float eps) {                                                                                        \
    qk_norm(qkv, wq, wk, out, rstd, heads, kv_heads, dim, eps);                                                       \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(MOST_THREADS)                                                          \
      qk_norm_dx_##S(const T* dy, const T* qkv, const T* wq, const T* wk, const float* rstd, T* dqkv, int heads,      \
                     int kv_heads, int dim) {                                                                         \
    qk_norm_dx(dy, qkv, wq, wk, rstd, dqkv, heads, kv_heads, dim);                                                    \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(MOST_THREADS)                                                          \
      rope_##S(T* qkv, const float* cosines, const float* sines, int sequence, int heads, int kv_heads, int dim,      \
               int position0, int inverse) {                                                                          \
    rope(qkv, cosines, sines, sequence, heads, kv_heads, dim, position0, inverse);                                    \
  }

ROW_KERNELS(bf16, bf16)
ROW_KERNELS(float, f32)

// Elementwise (gelu*, add): any grid, 256 threads, 8 elements a thread at a time.

// The elements at `at` of `len`, where `len` may pass 2^31.
template <class T>
__device__ __forceinline__ void take8(float (&v)[8], const T* x, long long at, long long len, bool wide) {
  get8(x + at, 0, (int)min(len - at, 8LL), wide).unpack(v);
}
template <class T>
__device__ __forceinline__ void give8(T* x, long long at, long long len, bool wide, const float (&v)[8]) {
  put8(x + at, 0, (int)min(len - at, 8LL), wide, v);
}

constexpr float TANH_SCALE = 0.7978845608f;   // sqrt(2 / pi)
constexpr float TANH_CUBE = 0.044715f;
constexpr float NORMAL_PEAK = 0.3989422804f;  // 1 / sqrt(2 pi)
constexpr float ROOT_HALF = 0.7071067812f;

__device__ __forceinline__ float gelu_tanh(float x) {
  return tanhf(TANH_SCALE * fmaf(TANH_CUBE * x * x, x, x));
}
__device__ __forceinline__ float normal_cdf(float x) { return 0.5f * erfcf(-ROOT_HALF * x); }

template <class T> __device__ __forceinline__ void gelu(const T* a, T* h, long long len, int by_tanh) {
  bool wide = len % 8 == 0 && aligned16(a) && aligned16(h);
  each8(len, [&](long long at) {
    float v[8];
    take8(v, a, at, len, wide);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= by_tanh ? 0.5f * (1.0f + gelu_tanh(v[i])) : normal_cdf(v[i]);
    give8(h, at, len, wide, v);
  });
}

template <class T> __device__ __forceinline__ void gelu_dx(const T* dh, const T* a, T* da, long long len, int by_tanh) {
  bool wide = len % 8 == 0 && aligned16(a) && aligned16(dh) && aligned16(da);
  each8(len, [&](long long at) {
    float v[8], d[8];
    take8(v, a, at, len, wide);
    take8(d, dh, at, len, wide);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float x = v[i], slope;
      if (by_tanh) {
        float t = gelu_tanh(x), inner = TANH_SCALE * fmaf(x * x, 3.0f * TANH_CUBE, 1.0f);
        slope = 0.5f * fmaf(x, (1.0f - t * t) * inner, 1.0f + t);
      } else {
        slope = fmaf(x * NORMAL_PEAK, expf(-0.5f * x * x), normal_cdf(x));
      }
      v[i] = d[i] * slope;
    }
    give8(da, at, len, wide, v);
  });
}

// out = x + y, and + b by columns.
template <class T>
__device__ __forceinline__ void add(const T* x, const T* y, const T* b, T* out, long long len, int dim) {
  bool wide = len % 8 == 0 && aligned16(x) && aligned16(y) && aligned16(out);
  bool wide_b = dim % 8 == 0 && aligned16(b);
  each8(len, [&](long long at) {
    float v[8], w[8];
    take8(v, x, at, len, wide);
    take8(w, y, at, len, wide);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] += w[i];
    if (b) {
      int column = at >> 32 == 0 ? (int)((uint32_t)at % (uint32_t)dim) : (int)(at % dim);
      if (wide_b) {
        get8(b, column, dim, true).unpack(w);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) w[i] = as_f32(b[(column + i) % dim]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] += w[i];
    }
    give8(out, at, len, wide, v);
  });
}

// Where the rows of a launch lie: `row0` of a micro-batch is the first of them, whose first sequence is the global batch's
// `sequence0`. The rows of a sequence are two runs of positions, from `front` and from `back` on.
struct Rows {
  int row0, sequence0, sequence, front, back;
  __device__ __forceinline__ uint64_t place(long long i) const {
    long long row = row0 + i;
    int in_micro_batch = (int)(row / sequence), at = (int)(row % sequence), half = sequence / 2;
    int position = at < half ? front + at : back + at - half;
    return (uint64_t)(sequence0 + in_micro_batch) << 32 | (uint32_t)position;
  }
};

// y = acc + kept(x + bias), of rows by their places; what draws less than `cut` is left out. `acc` may be `y`.
template <class T>
__device__ __forceinline__ void dropout(const T* x, const T* bias, const T* acc, T* y, uint64_t key, Rows rows, int n,
                                        int dim, uint32_t cut, float scale) {
  bool wide = dim % 8 == 0 && aligned16(x) && aligned16(y) && (!bias || aligned16(bias)) && (!acc || aligned16(acc));
  each8_of_rows(n, dim, [&](long long row, int at) {
    float v[8], w[8];
    get8(x + row * dim, at, dim, wide).unpack(v);
    if (bias) {
      get8(bias, at, dim, wide).unpack(w);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] += w[i];
    }
    uint64_t of_row = mix(key ^ mix(FAULT == 31 ? (uint64_t)row : rows.place(row)));
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = 0.0f;
    if (acc) get8(acc + row * dim, at, dim, wide).unpack(w);
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      uint64_t drawn = draw4(of_row, at / 4 + q);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float factor = keeps(drawn, i, cut) ? scale : 0.0f;
        v[4 * q + i] = fmaf(v[4 * q + i], factor, w[4 * q + i]);
      }
    }
    put8(y + row * dim, at, dim, wide, v);
  });
}

#define ELEMENT_KERNELS(T, S)                                                                                      \
  extern "C" __global__ void __launch_bounds__(256) gelu_##S(const T* a, T* h, long long len, int by_tanh) {       \
    gelu(a, h, len, by_tanh);                                                                                      \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(256)                                                                \
      gelu_dx_##S(const T* dh, const T* a, T* da, long long len, int by_tanh) {                                    \
    gelu_dx(dh, a, da, len, by_tanh);                                                                              \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(256)                                                                \
      add_##S(const T* x, const T* y, const T* b, T* out, long long len, int dim) {                                \
    add(x, y, b, out, len, dim);                                                                                   \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(256)                                                                \
      dropout_##S(const T* x, const T* bias, const T* acc, T* y, uint64_t site, const Numbers* numbers, Rows rows, \
                  int n, int dim, uint32_t cut, float scale) {                                                     \
    dropout(x, bias, acc, y, site ^ numbers->draws, rows, n, dim, cut, scale);                                     \
  }

ELEMENT_KERNELS(bf16, bf16)
ELEMENT_KERNELS(float, f32)
