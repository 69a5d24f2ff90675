// Muon beside its products (gemm_f32.cu), with the operations of the host's CPU kernels, each rounded; and weights scaled
// where scores of attention are too great.
//
//   muon_momentum, muon_*, normalise, scale, scale_back, shift, matrix_sum: any grid, 256 threads
//   transpose: grid (ceil(cols / 32), ceil(rows / 32)), 256 threads
//   copy_block: any grid, 256 threads
//   logit_max: grid heads, 256 threads
//   qk_clip_*: grid (any, spans), 256 threads
#include "device.h"
#include "lanes.h"

// The momentum m goes towards the gradient, and `update` looks ahead of it.
extern "C" __global__ void __launch_bounds__(256)
    muon_momentum(float* m, float* update, const float* grad, const Numbers* numbers, long long len) {
  float beta = numbers->momentum, rest = numbers->momentum_rest, scale = numbers->grad_scale;
  each(len, [&](long long i) {
    float g = __fmul_rn(grad[i], scale), old = m[i];
    float now = __fadd_rn(old, __fmul_rn(rest, __fsub_rn(g, old)));
    m[i] = now;
    update[i] = __fadd_rn(g, __fmul_rn(beta, __fsub_rn(now, g)));
  });
}

__device__ __forceinline__ float moved(float w, float update, float keep, float step) {
  return __fadd_rn(__fmul_rn(w, keep), __fmul_rn(step, update));
}

// Weights decay and move along the update.
extern "C" __global__ void __launch_bounds__(256)
    muon_f32(float* w, const float* update, const Numbers* numbers, long long len, int decay) {
  float keep = decay ? numbers->keep : 1.0f, step = numbers->minus_lr;
  each(len, [&](long long i) { w[i] = moved(w[i], update[i], keep, step); });
}

extern "C" __global__ void __launch_bounds__(256) muon_bf16(bf16* param, float* master, const float* update,
                                                             const Numbers* numbers, long long len, int decay) {
  float keep = decay ? numbers->keep : 1.0f, step = numbers->minus_lr;
  each(len, [&](long long i) {
    float w = moved(master[i], update[i], keep, step);
    master[i] = w, param[i] = f2bf(w);
  });
}

__device__ __forceinline__ double norm_of(const double* squares, double smallest) {
  double norm = sqrt(*squares);
  return norm > smallest ? norm : smallest;
}

__device__ __forceinline__ void scaled(float* x, float by, long long len) {
  each(len, [&](long long i) { x[i] = __fmul_rn(x[i], by); });
}

// Divides by the root of a sum of squares, or by `smallest` if that is more.
extern "C" __global__ void __launch_bounds__(256)
    normalise(float* x, const double* squares, double smallest, long long len) {
  scaled(x, (float)(1.0 / norm_of(squares, smallest)), len);
}

// Multiplies by a number, and divides by the root of what `normalise` divided by.
extern "C" __global__ void __launch_bounds__(256)
    scale_back(float* x, float by, const double* squares, double smallest, long long len) {
  scaled(x, (float)((double)by / sqrt(norm_of(squares, smallest))), len);
}

extern "C" __global__ void __launch_bounds__(256) scale(float* x, float by, long long len) { scaled(x, by, len); }

// Adds a number to the diagonal of x [side, side].
extern "C" __global__ void __launch_bounds__(256) shift(float* x, float by, int side) {
  each(side, [&](long long i) { x[i * (side + 1)] = __fadd_rn(x[i * (side + 1)], by); });
}

// out = k I + l a + m b + n c, all [side, side]; c may be out.
extern "C" __global__ void __launch_bounds__(256)
    matrix_sum(const float* a, const float* b, const float* c, float* out, float k, float l, float m, float n, int side) {
  each((long long)side * side, [&](long long i) {
    float sum = __fadd_rn(__fmul_rn(l, a[i]), __fmul_rn(m, b[i]));
    sum = __fadd_rn(sum, __fmul_rn(n, c[i]));
    out[i] = i / side == i % side ? __fadd_rn(sum, k) : sum;
  });
}

constexpr int PATCH = 32;

// to [cols, rows] = from^T.
extern "C" __global__ void __launch_bounds__(256) transpose(const float* from, float* to, int rows, int cols) {
  SHARED_ARRAY(float, patch, PATCH * (PATCH + 1));
  int row0 = (int)blockIdx.y * PATCH, col0 = (int)blockIdx.x * PATCH, lane = (int)threadIdx.x % 32;
  for (int i = (int)threadIdx.x / 32; i < PATCH; i += 8) {
    bool real = row0 + i < rows && col0 + lane < cols;
    patch[i * (PATCH + 1) + lane] = real ? from[(long long)(row0 + i) * cols + col0 + lane] : 0.0f;
  }
  if (FAULT != 40) __syncthreads();
  for (int i = (int)threadIdx.x / 32; i < PATCH; i += 8) {
    if (col0 + i >= cols || row0 + lane >= rows) continue;
    to[(long long)(col0 + i) * rows + row0 + lane] = patch[lane * (PATCH + 1) + i];
  }
}

// Rows that lie ld_from apart to rows ld_to apart.
extern "C" __global__ void __launch_bounds__(256)
    copy_block(const float* from, long long ld_from, float* to, long long ld_to, int rows, int cols) {
  each((long long)rows * cols, [&](long long i) { to[i / cols * ld_to + i % cols] = from[i / cols * ld_from + i % cols]; });
}

// The greatest of each head in maxima [sequences, heads, sequence] joins that of the step.
extern "C" __global__ void __launch_bounds__(256)
    logit_max(const float* maxima, double* greatest, int sequences, int sequence) {
  SHARED_ARRAY(float, slots, 32);
  int head = (int)blockIdx.x, heads = (int)gridDim.x;
  float most = -INFINITY;
  for (int i = 0; i < sequences; ++i) {
    const float* of = maxima + ((long long)i * heads + head) * sequence;
    for (int at = (int)threadIdx.x; at < sequence; at += (int)blockDim.x) most = fmaxf(most, of[at]);
  }
  most = block_max(most, slots);
  if (threadIdx.x == 0 && (double)most > greatest[head]) greatest[head] = most;
}

// Rows of a matrix that are scaled alike, by the greatest score of some heads, as the host lays it out: `alone` by the
// whole factor, else by its root.
struct Scaled {
  long long row0, rows_end, head0, heads_end, alone;
};

// What a span of rows is multiplied by: at most 1. `maxima` has a row of `heads` for each of `ranks`, `apart` from one to
// the next.
__device__ __forceinline__ float factor_of(const Scaled& s, const double* maxima, int ranks, long long apart, double tau) {
  double greatest = 0.0;
  for (int rank = 0; rank < ranks; ++rank) {
    for (long long head = s.head0; head < s.heads_end; ++head) greatest = fmax(greatest, maxima[rank * apart + head]);
  }
  double factor = tau / greatest;
  if (FAULT == 41) return (float)factor;
  return factor < 1.0 ? (float)(s.alone ? factor : sqrt(factor)) : 1.0f;
}

// Calls `put(i)` with the block's share of a span's elements among the `count` that lie here from `first` on, `width` to
// a row; nothing is touched where no score is too great.
template <class Put>
__device__ __forceinline__ void clip(const Scaled& s, float by, long long first, long long count, int width, Put put) {
  if (by == 1.0f) return;
  long long from = max(s.row0 * width - first, 0LL), end = min(s.rows_end * width - first, count);
  if (end > from) each(end - from, [&](long long i) { put(from + i); });
}

extern "C" __global__ void __launch_bounds__(256)
    qk_clip_f32(float* w, const Scaled* spans, const double* maxima, int ranks, long long apart, double tau,
                long long first, long long count, int width) {
  const Scaled s = spans[blockIdx.y];
  float by = factor_of(s, maxima, ranks, apart, tau);
  clip(s, by, first, count, width, [&](long long i) { w[i] = __fmul_rn(w[i], by); });
}

extern "C" __global__ void __launch_bounds__(256)
    qk_clip_bf16(bf16* param, float* master, const Scaled* spans, const double* maxima, int ranks, long long apart,
                 double tau, long long first, long long count, int width) {
  const Scaled s = spans[blockIdx.y];
  float by = factor_of(s, maxima, ranks, apart, tau);
  clip(s, by, first, count, width, [&](long long i) {
    float w = __fmul_rn(master[i], by);
    master[i] = w, param[i] = f2bf(w);
  });
}
