// Latent attention around its products (DeepSeek-V2, arXiv 2405.04434, section 2.1), as the host's CPU kernels define
// it.
//
//   latent_norm_*, latent_norm_dx_*: grid (rows, 1, or 2 with a latent of queries), 32 to 256 threads, a multiple of 32
//     that follows from the longest part alone: the projections of a row, [queries + kv + shared], have a norm for each
//     latent, and a shared part that is copied
//   latent_rope_*, latent_rope_dx_*: grid rows, any multiple of 32 threads up to 256. A row of qkv holds `heads`
//     queries and as many keys of nope + rope elements, then as many values
//   latent_decode_*: grid heads, 256 threads, (2 * rank + rope) floats of shared memory: a token over its cache
#include "device.h"
#include "lanes.h"

constexpr int MOST_THREADS = 256;

// Widths of the projections of a row, one behind the other; 0 where queries have no latent.
struct Latents {
  int queries, kv, shared;
  __device__ __forceinline__ int cols() const { return queries + kv + shared; }
  // Which norm a block has: 0 of keys and values, 1 of queries; where it begins in a row, and how long it is.
  __device__ __forceinline__ int first(int norm) const { return norm ? 0 : queries; }
  __device__ __forceinline__ int dim(int norm) const { return norm ? queries : kv; }
};

// Calls `body(at)` for a thread's groups of eight of a row.
template <class Body> __device__ __forceinline__ void each_group(int dim, Body body) {
  for (int at = (int)threadIdx.x * 8; at < dim; at += (int)blockDim.x * 8) body(at);
}

template <class T> __device__ __forceinline__ void copy_row(const T* from, T* to, int dim, bool wide) {
  each_group(dim, [&](int at) {
    float v[8];
    get8(from, at, dim, wide).unpack(v);
    put8(to, at, dim, wide, v);
  });
}

// Within 2 ulp, as for other norms.
__device__ __forceinline__ float mean_of(float sum, int dim) { return __fdividef(sum, (float)dim); }

template <class T>
__device__ __forceinline__ void latent_norm(const T* c, const T* wkv, const T* wq, T* latent, T* shared, T* queries,
                                            float* rstd, Latents l, float eps, float* slots) {
  int norm = (int)blockIdx.y, dim = l.dim(norm);
  long long row = blockIdx.x;
  const T *x = c + row * l.cols() + l.first(norm), *w = norm ? wq : wkv;
  T* y = (norm ? queries : latent) + row * dim;
  bool wide = dim % 8 == 0 && l.cols() % 8 == 0 && l.queries % 8 == 0 && aligned16(c) && aligned16(w) && aligned16(y);
  float squares = 0.0f, v[8], g[8];
  each_group(dim, [&](int at) {
    get8(x, at, dim, wide).unpack(v);
#pragma unroll
    for (int i = 0; i < 8; ++i) squares = fmaf(v[i], v[i], squares);
  });
  float r = rsqrtf(mean_of(block_sum(squares, slots), dim) + eps);
  if (threadIdx.x == 0) rstd[row * gridDim.y + norm] = r;
  each_group(dim, [&](int at) {
    get8(x, at, dim, wide).unpack(v);
    get8(w, at, dim, wide).unpack(g);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = v[i] * r * g[i];
    put8(y, at, dim, wide, v);
  });
  if (norm == 0) copy_row(x + dim, shared + row * l.shared, l.shared, wide && l.shared % 8 == 0 && aligned16(shared));
}

template <class T>
__device__ __forceinline__ void latent_norm_dx(const T* dlatent, const T* dshared, const T* dqueries, const T* c,
                                               const T* wkv, const T* wq, const float* rstd, T* dc, Latents l,
                                               float* slots) {
  int norm = (int)blockIdx.y, dim = l.dim(norm);
  long long row = blockIdx.x, from = row * l.cols() + l.first(norm);
  const T *x = c + from, *w = norm ? wq : wkv, *dy = (norm ? dqueries : dlatent) + row * dim;
  T* dx = dc + from;
  bool wide = dim % 8 == 0 && l.cols() % 8 == 0 && l.queries % 8 == 0 && aligned16(c) && aligned16(w) &&
              aligned16(dy) && aligned16(dc);
  float dot = 0.0f, v[8], d[8], g[8], r = rstd[row * gridDim.y + norm];
  each_group(dim, [&](int at) {
    get8(x, at, dim, wide).unpack(v);
    get8(dy, at, dim, wide).unpack(d);
    get8(w, at, dim, wide).unpack(g);
#pragma unroll
    for (int i = 0; i < 8; ++i) dot = fmaf(d[i] * g[i], v[i], dot);
  });
  float back = -(r * r * mean_of(block_sum(dot, slots), dim));
  each_group(dim, [&](int at) {
    get8(x, at, dim, wide).unpack(v);
    get8(dy, at, dim, wide).unpack(d);
    get8(w, at, dim, wide).unpack(g);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = fmaf(v[i], back, d[i] * g[i]) * r;
    put8(dx, at, dim, wide, v);
  });
  wide = wide && l.shared % 8 == 0 && aligned16(dshared);
  if (norm == 0) copy_row(dshared + row * l.shared, dx + dim, l.shared, wide);
}

// Heads whose queries and keys are `nope` elements and `rope` rotated ones, which all keys share.
struct LatentHeads {
  int heads, nope, rope, value;
  __device__ __forceinline__ int key() const { return nope + rope; }
  __device__ __forceinline__ bool eights() const { return nope % 8 == 0 && rope % 8 == 0 && value % 8 == 0; }
};

// Turns neighbours 2 j and 2 j + 1 of eight elements, by `from` on of a position's row of `half` angles; `turn` is 1, or
// -1 for the way back.
__device__ __forceinline__ void rotate(float (&v)[8], const float* cosine, const float* sine, int from, int half,
                                       float turn) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (from + j >= half) continue;
    float c = cosine[from + j], s = turn * sine[from + j], a = v[2 * j], b = v[2 * j + 1];
    v[2 * j] = a * c - b * s;
    v[2 * j + 1] = b * c + a * s;
  }
}

__device__ __forceinline__ int eights_of(int dim) { return (dim + 7) / 8; }

// Copies a head's queries or keys from two places, `plain` and `rotated`, to two places, the latter turned.
template <class T>
__device__ __forceinline__ void copy_head(const LatentHeads& h, int group, const T* plain, const T* rotated,
                                          T* to_plain, T* to_rotated, const float* cosine, const float* sine,
                                          float turn, bool wide) {
  float v[8];
  int at = group * 8;
  if (group < eights_of(h.nope)) {
    get8(plain, at, h.nope, wide).unpack(v);
    put8(to_plain, at, h.nope, wide, v);
    return;
  }
  at -= eights_of(h.nope) * 8;
  get8(rotated, at, h.rope, wide).unpack(v);
  rotate(v, cosine, sine, at / 2, h.rope / 2, turn);
  put8(to_rotated, at, h.rope, wide, v);
}

template <class T>
__device__ __forceinline__ void latent_rope(const T* q, const T* kv, const T* shared, const float* cosines,
                                            const float* sines, T* qkv, int sequence, LatentHeads h) {
  long long row = blockIdx.x, angles = row % sequence * (h.rope / 2);
  int key = h.key(), keys = h.heads * key, groups = eights_of(h.nope) + eights_of(h.rope), values = eights_of(h.value);
  q += row * keys, kv += row * h.heads * (h.nope + h.value), shared += row * h.rope;
  qkv += row * (2 * keys + h.heads * h.value);
  const float *cosine = cosines + angles, *sine = sines + angles;
  bool wide = h.eights() && aligned16(q) && aligned16(kv) && aligned16(shared) && aligned16(qkv);
  int each = 2 * groups + values;
  for (int i = (int)threadIdx.x; i < h.heads * each; i += (int)blockDim.x) {
    int head = i / each, at = i % each;
    const T* own = kv + head * (h.nope + h.value);
    if (at < groups) {
      const T* from = q + head * key;
      T* to = qkv + head * key;
      copy_head(h, at, from, from + h.nope, to, to + h.nope, cosine, sine, 1.0f, wide);
    } else if (at < 2 * groups) {
      T* to = qkv + keys + head * key;
      copy_head(h, at - groups, own, shared, to, to + h.nope, cosine, sine, 1.0f, wide);
    } else {
      float v[8];
      get8(own + h.nope, (at - 2 * groups) * 8, h.value, wide).unpack(v);
      put8(qkv + 2 * keys + head * h.value, (at - 2 * groups) * 8, h.value, wide, v);
    }
  }
}

template <class T>
__device__ __forceinline__ void latent_rope_dx(const T* dqkv, const float* cosines, const float* sines, T* dq, T* dkv,
                                               T* dshared, int sequence, LatentHeads h) {
  long long row = blockIdx.x, angles = row % sequence * (h.rope / 2);
  int key = h.key(), keys = h.heads * key, queries = eights_of(h.nope) + eights_of(h.rope), nope = eights_of(h.nope);
  dq += row * keys, dkv += row * h.heads * (h.nope + h.value), dshared += row * h.rope;
  dqkv += row * (2 * keys + h.heads * h.value);
  const float *cosine = cosines + angles, *sine = sines + angles;
  bool wide = h.eights() && aligned16(dqkv) && aligned16(dq) && aligned16(dkv);
  int each = queries + nope + eights_of(h.value);
  for (int i = (int)threadIdx.x; i < h.heads * each; i += (int)blockDim.x) {
    int head = i / each, at = i % each;
    T* own = dkv + head * (h.nope + h.value);
    float v[8];
    if (at < queries) {
      const T* from = dqkv + head * key;
      T* to = dq + head * key;
      copy_head(h, at, from, from + h.nope, to, to + h.nope, cosine, sine, -1.0f, wide);
    } else if (at < queries + nope) {
      get8(dqkv + keys + head * key, (at - queries) * 8, h.nope, wide).unpack(v);
      put8(own, (at - queries) * 8, h.nope, wide, v);
    } else {
      get8(dqkv + 2 * keys + head * h.value, (at - queries - nope) * 8, h.value, wide).unpack(v);
      put8(own + h.nope, (at - queries - nope) * 8, h.value, wide, v);
    }
  }
  // The shared part has a gradient of every head, which are added in their order.
  for (int j = (int)threadIdx.x; j < h.rope / 2; j += (int)blockDim.x) {
    float a = 0.0f, b = 0.0f;
    for (int i = 0; i < h.heads; ++i) {
      const T* of = dqkv + keys + (FAULT == 60 ? h.heads - 1 - i : i) * key + h.nope + 2 * j;
      a += as_f32(of[0]), b += as_f32(of[1]);
    }
    put_f32(dshared + 2 * j, a * cosine[j] + b * sine[j]);
    put_f32(dshared + 2 * j + 1, b * cosine[j] - a * sine[j]);
  }
}

// One token over its cache: keys and values are never made. A head's query goes into the space of latents, and what it
// finds there out of it again. `up`, [heads (nope + value), rank], makes keys and values of latents.
template <class T>
__device__ __forceinline__ void latent_decode(const T* q, const T* latent, const T* shared, const T* up, const T* sinks,
                                              const float* cosines, const float* sines, T* latents, T* keys, T* o,
                                              float* scores, int capacity, int position, int window, int rank,
                                              LatentHeads h, float scale, float* room, float* slots) {
  float *inner = room, *sums = inner + rank, *rotated = sums + rank;
  int head = (int)blockIdx.x, warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, warps = (int)blockDim.x / 32;
  long long angles = (long long)position * (h.rope / 2);
  const float *cosine = cosines + angles, *sine = sines + angles;
  q += head * h.key(), up += (long long)head * (h.nope + h.value) * rank, scores += (long long)head * capacity;
  if (head == 0) {
    for (int r = (int)threadIdx.x; r < rank; r += (int)blockDim.x) latents[(long long)position * rank + r] = latent[r];
    for (int j = (int)threadIdx.x; j < h.rope / 2; j += (int)blockDim.x) {
      float a = as_f32(shared[2 * j]), b = as_f32(shared[2 * j + 1]);
      put_f32(keys + (long long)position * h.rope + 2 * j, a * cosine[j] - b * sine[j]);
      put_f32(keys + (long long)position * h.rope + 2 * j + 1, b * cosine[j] + a * sine[j]);
    }
  }
  // What keys are multiplied by: `inner` with latents, `rotated` with the shared part.
  for (int r = (int)threadIdx.x; r < rank; r += (int)blockDim.x) {
    float sum = 0.0f;
    for (int j = 0; j < h.nope; ++j) sum = fmaf(as_f32(q[j]), as_f32(up[(long long)j * rank + r]), sum);
    inner[r] = sum;
  }
  for (int j = (int)threadIdx.x; j < h.rope / 2; j += (int)blockDim.x) {
    float a = as_f32(q[h.nope + 2 * j]), b = as_f32(q[h.nope + 2 * j + 1]);
    rotated[2 * j] = a * cosine[j] - b * sine[j];
    rotated[2 * j + 1] = b * cosine[j] + a * sine[j];
  }
  if (FAULT != 61) __syncthreads();
  int begin = window > 0 ? max(position + 1 - window, 0) : 0;
  float top = -INFINITY;
  for (int i = begin + warp; i <= position; i += warps) {
    // The token's own rows are read where they came from: other blocks may not have seen the cache's yet.
    const T* of = i < position ? latents + (long long)i * rank : latent;
    float dot = 0.0f;
    for (int r = lane; r < rank; r += 32) dot = fmaf(inner[r], as_f32(of[r]), dot);
    for (int j = lane; j < h.rope; j += 32) {
      float x;
      if (i < position) {
        x = as_f32(keys[(long long)i * h.rope + j]);
      } else {
        float a = as_f32(shared[j & ~1]), b = as_f32(shared[j | 1]);
        T rounded;
        put_f32(&rounded, j & 1 ? b * cosine[j / 2] + a * sine[j / 2] : a * cosine[j / 2] - b * sine[j / 2]);
        x = as_f32(rounded);
      }
      dot = fmaf(rotated[j], x, dot);
    }
    float score = warp_sum(dot) * scale;
    top = fmaxf(top, score);
    if (lane == 0) scores[i] = score;
  }
  float sink = sinks ? as_f32(sinks[head]) : -INFINITY;
  top = fmaxf(block_max(top, slots), sink);
  __syncthreads();  // scores are there for all
  float total = 0.0f;
  for (int i = begin + (int)threadIdx.x; i <= position; i += (int)blockDim.x) total += expf(scores[i] - top);
  total = block_sum(total, slots + 32) + (sinks ? expf(sink - top) : 0.0f);
  for (int r = (int)threadIdx.x; r < rank; r += (int)blockDim.x) {
    float sum = 0.0f;
    for (int i = begin; i <= position; ++i) {
      const T* of = i < position ? latents + (long long)i * rank : latent;
      sum = fmaf(expf(scores[i] - top) / total, as_f32(of[r]), sum);
    }
    sums[r] = sum;
  }
  __syncthreads();
  for (int v = warp; v < h.value; v += warps) {
    const T* of = up + (long long)(h.nope + v) * rank;
    float dot = 0.0f;
    for (int r = lane; r < rank; r += 32) dot = fmaf(sums[r], as_f32(of[r]), dot);
    dot = warp_sum(dot);
    if (lane == 0) put_f32(o + head * h.value + v, dot);
  }
}

#define LATENT_KERNELS(T, S)                                                                                          \
  extern "C" __global__ void __launch_bounds__(MOST_THREADS)                                                          \
      latent_norm_##S(const T* c, const T* wkv, const T* wq, T* latent, T* shared, T* queries, float* rstd,           \
                      Latents widths, float eps) {                                                                    \
    SHARED_ARRAY(float, slots, 32);                                                                                   \
    latent_norm(c, wkv, wq, latent, shared, queries, rstd, widths, eps, slots);                                       \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(MOST_THREADS)                                                          \
      latent_norm_dx_##S(const T* dlatent, const T* dshared, const T* dqueries, const T* c, const T* wkv,             \
                         const T* wq, const float* rstd, T* dc, Latents widths) {                                     \
    SHARED_ARRAY(float, slots, 32);                                                                                   \
    latent_norm_dx(dlatent, dshared, dqueries, c, wkv, wq, rstd, dc, widths, slots);                                  \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(MOST_THREADS)                                                          \
      latent_rope_##S(const T* q, const T* kv, const T* shared, const float* cosines, const float* sines, T* qkv,     \
                      int sequence, LatentHeads heads) {                                                              \
    latent_rope(q, kv, shared, cosines, sines, qkv, sequence, heads);                                                 \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(MOST_THREADS)                                                          \
      latent_rope_dx_##S(const T* dqkv, const float* cosines, const float* sines, T* dq, T* dkv, T* dshared,          \
                         int sequence, LatentHeads heads) {                                                           \
    latent_rope_dx(dqkv, cosines, sines, dq, dkv, dshared, sequence, heads);                                          \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(MOST_THREADS)                                                          \
      latent_decode_##S(const T* q, const T* latent, const T* shared, const T* up, const T* sinks,                    \
                        const float* cosines, const float* sines, T* latents, T* keys, T* o, float* scores,           \
                        int capacity, int position, int window, int rank, LatentHeads heads, float scale) {           \
    SHARED_ARRAY(float, slots, 64);                                                                                   \
    SHARED(float, room);                                                                                              \
    latent_decode(q, latent, shared, up, sinks, cosines, sines, latents, keys, o, scores, capacity, position, window, \
                  rank, heads, scale, room, slots);                                                                   \
  }
LATENT_KERNELS(bf16, bf16)
LATENT_KERNELS(float, f32)
