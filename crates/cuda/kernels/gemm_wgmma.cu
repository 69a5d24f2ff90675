// Products of row-major bf16 matrices for sm_90a, summed in f32 over the inner dimension in steps of 16, in order: the
// bits of a result depend on its row and column alone, not on the tile, the number of rows, or the launch.
//
//   gemm_nt_bf16_<T>: y [n, out] = x [n, in] w [out, in]^T (+ acc) (+ bias), rounded once; acc may be y
//   gemm_nn_bf16_<T>: dx [n, in] = dy [n, out] w [out, in] (+ acc), the same
//   gemm_tn_f32_<T>:  for each of `subtrees` parts: the leaves' products dy^T x [out, in], each of leaf_rows rows, summed
//     in the order of `tree`; the sum meets levels + part * subtree_stride: for l < merge r = levels[l] + r, then
//     levels[store] = r, with levels level_len apart
//
// <T> is 128x256, 128x192 or 128x128, rows by columns of a tile of the result.
//   grid    min(tiles, multiprocessors), tiles = ceil(rows / 128) * ceil(columns / WIDTH) * subtrees
//   block   384 threads; dynamic shared memory: BYTES = 196672, 204880, 196704 bytes
//   held    of gemm_tn: float[grid][levels][128 * WIDTH], where levels is the tree's depth; one less with 128x192 and
//           128x128, which hold the lowest level in registers. Null where that is none.
// Tensor maps, all of three dimensions, bf16, 128-byte swizzle, no interleave, zeros outside; `ld` elements a row:
//   a factor [rows, inner] of nt, and dy of nn: dims {inner, rows, 1}, strides {2 ld, 2 ld rows}, box {64, R, 1} with
//     R = 128 for the activations, R = WIDTH for w of nt
//   w of nn: dims {in, out, 1}, strides {2 ld, 2 ld out}, box {64, 64, 1}
//   dy and x of tn: dims {columns, leaf_rows, leaves}, strides {2 ld, 2 ld leaf_rows}, box {64, 64, 1}, with all leaves of
//     all subtrees in order
// Addresses are aligned to 16 bytes, and rows are multiples of 8 elements apart. Columns are a multiple of 8, ld even.
#include "device.h"
#include "hopper.h"
#include "leaves.h"

enum class Form { NT, NN, TN };

template <int WIDTH> struct GemmTile {
  static constexpr int ROWS = 128, DEPTH = 64, GROUPS = 2;
  static constexpr int THREADS = 128 * (GROUPS + 1);
  static constexpr int STAGES = WIDTH == 256 ? 4 : WIDTH == 192 ? 5 : 6;
  static constexpr int LEFT_BYTES = ROWS * DEPTH * 2, RIGHT_BYTES = WIDTH * DEPTH * 2;
  static constexpr int STAGE_BYTES = LEFT_BYTES + RIGHT_BYTES;
  static constexpr int BYTES = STAGES * STAGE_BYTES + 2 * STAGES * 8;
  static constexpr int FOURS = WIDTH / 8;  // accumulators of a thread, by four
  static constexpr bool HOLDS = WIDTH <= 192;  // room in registers for sums of leaves, too
};

// Tiles in an order in which those that run at once share rows and columns: bands of rows, columns by columns.
struct Raster {
  static constexpr int BAND = 16;
  int rows, cols, count;
  template <int HEIGHT, int WIDTH> static __device__ __forceinline__ Raster of(int n, int width) {
    Raster r;
    r.rows = (n + HEIGHT - 1) / HEIGHT;
    r.cols = (width + WIDTH - 1) / WIDTH;
    r.count = r.rows * r.cols;
    return r;
  }
  __device__ __forceinline__ void at(int i, int& row, int& col) const {
    int band = i / (BAND * cols), within = i - band * (BAND * cols);
    int height = min(BAND, rows - band * BAND);
    col = within / height;
    row = band * BAND + within - col * height;
  }
};

// Where the producer or a consumer is in the ring of stages.
template <int STAGES> struct Turnstile {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

template <int WIDTH> struct Ring {
  using G = GemmTile<WIDTH>;
  unsigned char* stages;
  uint64_t *full, *empty;
  __device__ __forceinline__ Ring(unsigned char* shared) : stages(shared) {
    full = (uint64_t*)(shared + G::STAGES * G::STAGE_BYTES);
    empty = full + G::STAGES;
  }
};

// Brings the factors of one step: the inner dimension from `inner` on, of leaf `leaf`.
template <Form FORM, int WIDTH>
__device__ __forceinline__ void gemm_fetch(unsigned char* to, uint64_t* full, const TensorMap* left,
                                           const TensorMap* right, int row, int col, int inner, int leaf) {
  using G = GemmTile<WIDTH>;
  constexpr int PANEL = 64 * G::DEPTH * 2;
  if constexpr (FORM == Form::TN) {
#pragma unroll
    for (int p = 0; p < G::ROWS / 64; ++p) tma_load_3d(to + p * PANEL, left, full, row + p * 64, inner, leaf);
  } else {
    tma_load_3d(to, left, full, inner, row, 0);
  }
  to += G::LEFT_BYTES;
  if constexpr (FORM == Form::NT) {
    tma_load_3d(to, right, full, inner, col, 0);
  } else {
#pragma unroll
    for (int p = 0; p < WIDTH / 64; ++p) tma_load_3d(to + p * PANEL, right, full, col + p * 64, inner, leaf);
  }
}

// c = the product over `inner` of this group's 64 rows; stages are given back as soon as they have been read.
template <Form FORM, int WIDTH>
__device__ __forceinline__ void gemm_multiply(float (&c)[WIDTH / 8][4], const Ring<WIDTH>& ring,
                                              Turnstile<GemmTile<WIDTH>::STAGES>& turn, int steps, int group, int lane) {
  using G = GemmTile<WIDTH>;
  constexpr bool LEFT_COLUMNS = FORM == Form::TN, RIGHT_COLUMNS = FORM != Form::NT;
  constexpr int LEFT_STEP = LEFT_COLUMNS ? 2048 : 32, RIGHT_STEP = RIGHT_COLUMNS ? 2048 : 32;
  // Both 64 rows on, and 64 columns on.
  constexpr int NEXT = 64 * G::DEPTH * 2;
  uint32_t base = shared_address(ring.stages);
  int before = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    if (FAULT != 20) mbarrier_wait(&ring.full[turn.stage], turn.parity);
    uint32_t stage = base + turn.stage * G::STAGE_BYTES;
    uint64_t left = wgmma_operand(stage + group * NEXT, NEXT);
    uint64_t right = wgmma_operand(stage + G::LEFT_BYTES, NEXT);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < G::DEPTH / 16; ++k) {
      wgmma<WIDTH, LEFT_COLUMNS, RIGHT_COLUMNS>(c, wgmma_further(left, k * LEFT_STEP),
                                                wgmma_further(right, k * RIGHT_STEP), step > 0 || k > 0);
    }
    wgmma_commit();
    // The step before is done when only this one is under way.
    if (FAULT != 21) wgmma_wait<1>();
    if (step > 0 && lane == 0) mbarrier_arrive(&ring.empty[before]);
    before = turn.stage;
    turn.next();
  }
  if (FAULT != 22) wgmma_wait<0>();
  if (lane == 0) mbarrier_arrive(&ring.empty[before]);
}

// Transposes 4 x 4 words of four neighbouring lanes.
__device__ __forceinline__ void transpose4(uint32_t (&w)[4], int lane) {
  bool odd = lane & 1, high = lane & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    uint32_t got = __shfl_xor_sync(~0u, odd ? w[i] : w[i + 1], 1);
    (odd ? w[i] : w[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t got = __shfl_xor_sync(~0u, high ? w[i] : w[i + 2], 2);
    (high ? w[i] : w[i + 2]) = got;
  }
}

// Writes a tile in bf16. Lanes hold two columns of a row; four lanes exchange, so that each moves 16 bytes at a time.
template <int WIDTH>
__device__ __forceinline__ void gemm_write(const float (&c)[WIDTH / 8][4], bf16* y, const bf16* acc, const bf16* bias,
                                           int rows, int cols, long long ld, int row, int col, int lane) {
  int quarter = lane & 3;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int own = row + half * 8;
    long long at = own * ld + col + quarter * 8;
    uint32_t sums[WIDTH / 32][4];
    if (acc) {
#pragma unroll
      for (int j = 0; j < WIDTH / 32; ++j) {
        bool inside = own < rows && col + j * 32 + quarter * 8 < cols;
        uint4 v = inside ? load16_rw(acc + at + j * 32) : make_uint4(0, 0, 0, 0);
        sums[j][0] = v.x, sums[j][1] = v.y, sums[j][2] = v.z, sums[j][3] = v.w;
      }
    }
#pragma unroll
    for (int j = 0; j < WIDTH / 32; ++j) {
      uint32_t w[4];
      if (acc) transpose4(sums[j], lane);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        float low = c[j * 4 + n][2 * half], high = c[j * 4 + n][2 * half + 1];
        if (acc) {
          low += __uint_as_float(sums[j][n] << 16);
          high += __uint_as_float(sums[j][n] & 0xffff0000u);
        }
        if (bias) {
          int column = col + (j * 4 + n) * 8 + quarter * 2;
          uint32_t b = column < cols ? *(const uint32_t*)(bias + column) : 0;
          low += __uint_as_float(b << 16);
          high += __uint_as_float(b & 0xffff0000u);
        }
        w[n] = pack_bf16(low, high);
      }
      transpose4(w, lane);
      if (own < rows && col + j * 32 + quarter * 8 < cols) {
        store16(y + at + j * 32, make_uint4(w[0], w[1], w[2], w[3]));
      }
    }
  }
}

// Brings a tile of sums to the levels of a gradient.
template <int WIDTH>
__device__ __forceinline__ void gemm_merge(float (&c)[WIDTH / 8][4], float* levels, long long level_len, int merge,
                                           int store, int rows, int cols, int row, int col, int lane) {
  int own = cols - col - (lane & 3) * 2;  // columns from this lane's first on
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + half * 8 >= rows) continue;
    float* to = levels + (long long)(row + half * 8) * cols + col + (lane & 3) * 2;
#pragma unroll 1
    for (int l = 0; l < merge; ++l) {
      // What is inside is asked anew each time: answers for all columns would not fit in registers.
      recompute(own);
      const float* from = to + l * level_len;
#pragma unroll
      for (int n = 0; n < WIDTH / 8; ++n) {
        if (n * 8 >= own) continue;
        float2 v = *(const float2*)(from + n * 8);
        c[n][2 * half] = v.x + c[n][2 * half];
        c[n][2 * half + 1] = v.y + c[n][2 * half + 1];
      }
    }
    recompute(own);
    to += store * level_len;
#pragma unroll
    for (int n = 0; n < WIDTH / 8; ++n) {
      if (n * 8 < own) *(float2*)(to + n * 8) = make_float2(c[n][2 * half], c[n][2 * half + 1]);
    }
  }
}

// What the forms differ in.
struct GemmJob {
  int rows, cols, inner;  // of the result, and of what is summed over: for TN, of a leaf
  // nt and nn
  bf16* y;
  const bf16 *acc, *bias;
  long long ld;
  // tn
  float *levels, *held;
  long long level_len, subtree_stride;
  int leaves, subtrees, merge, store;
};

// One warp brings tiles by TMA, two warpgroups multiply.
template <Form FORM, int WIDTH>
__device__ __forceinline__ void gemm(const TensorMap* left, const TensorMap* right, const GemmJob& job,
                                     const Tree& tree) {
  using G = GemmTile<WIDTH>;
  SHARED(unsigned char, shared);
  Ring<WIDTH> ring(shared);
  Raster raster = Raster::of<G::ROWS, WIDTH>(job.rows, job.cols);
  int count = FORM == Form::TN ? raster.count * job.subtrees : raster.count;
  int leaves = FORM == Form::TN ? job.leaves : 1;
  int steps = (job.inner + G::DEPTH - 1) / G::DEPTH;
  Turnstile<G::STAGES> turn;

  if (threadIdx.x == 0) {
    tensor_map_prefetch(left);
    tensor_map_prefetch(right);
    for (int i = 0; i < G::STAGES; ++i) {
      mbarrier_init(&ring.full[i], 1);
      mbarrier_init(&ring.empty[i], G::GROUPS * 4);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  int group = (int)threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
  if (group < 0) {
    registers_down<40>();
    if (threadIdx.x != 0) return;
    for (int i = blockIdx.x; i < count; i += gridDim.x) {
      int part = FORM == Form::TN ? i / raster.count : 0, row, col;
      raster.at(i - part * raster.count, row, col);
      for (int leaf = part * leaves; leaf < (part + 1) * leaves; ++leaf) {
        for (int step = 0; step < steps; ++step) {
          if (FAULT != 23) mbarrier_wait(&ring.empty[turn.stage], turn.parity ^ 1);
          mbarrier_expect(&ring.full[turn.stage], G::STAGE_BYTES);
          gemm_fetch<FORM, WIDTH>(ring.stages + turn.stage * G::STAGE_BYTES, &ring.full[turn.stage], left, right,
                                  row * G::ROWS, col * WIDTH, step * G::DEPTH, leaf);
          turn.next();
        }
      }
    }
    return;
  }

  registers_up<232>();
  for (int i = blockIdx.x; i < count; i += gridDim.x) {
    // Where a tile lies is only of interest in its end, and registers are scarce until then.
    auto place = [&](int& part, int& row, int& col) {
      part = FORM == Form::TN ? i / raster.count : 0;
      raster.at(i - part * raster.count, row, col);
      row = row * G::ROWS + group * 64 + (int)threadIdx.x / 32 % 4 * 16 + (lane >> 2);
      col *= WIDTH;
    };
    auto merge = [&](float(&r)[G::FOURS][4]) {
      int part, row, col;
      place(part, row, col);
      gemm_merge<WIDTH>(r, job.levels + part * job.subtree_stride, job.level_len, job.merge, job.store, job.rows,
                        job.cols, row, col, lane);
    };
    if constexpr (FORM == Form::TN) {
      constexpr int FIRST = G::HOLDS ? 1 : 0;
      HeldSums<G::FOURS, FIRST, 128 * G::GROUPS> held;
      held.memory = (float4*)job.held + blockIdx.x * (tree.depth - FIRST) * held.STEP + (threadIdx.x - 128);
      // What a product begins with is a variable of its own for each leaf, and not the sum before it: the compiler lets
      // no two products overlap if one needs the other's end.
      if constexpr (G::HOLDS) {
        float sum[G::FOURS][4];
        int radix = tree.depth > 0 ? tree.radices[0] : 1;
#pragma unroll 1
        for (int node = 0; node * radix < leaves; ++node) {
          // -0 is what changes nothing, not even a 0.
#pragma unroll
          for (int n = 0; n < G::FOURS * 4; ++n) sum[n / 4][n % 4] = -0.0f;
#pragma unroll 1
          for (int digit = 0; digit < radix; ++digit) {
            float c[G::FOURS][4];
            gemm_multiply<FORM, WIDTH>(c, ring, turn, steps, group, lane);
#pragma unroll
            for (int n = 0; n < G::FOURS * 4; ++n) sum[n / 4][n % 4] += c[n / 4][n % 4];
          }
          held.climb(sum, tree, node);
        }
        merge(sum);
      } else {
#pragma unroll 1
        for (int leaf = 0; leaf < leaves; ++leaf) {
          float c[G::FOURS][4];
          gemm_multiply<FORM, WIDTH>(c, ring, turn, steps, group, lane);
          if (held.climb(c, tree, leaf)) merge(c);
        }
      }
    } else {
      float c[G::FOURS][4];
      gemm_multiply<FORM, WIDTH>(c, ring, turn, steps, group, lane);
      int part, row, col;
      place(part, row, col);
      gemm_write<WIDTH>(c, job.y, job.acc, job.bias, job.rows, job.cols, job.ld, row, col, lane);
    }
  }
}

#define GEMM_ROWS(NAME, FORM, WIDTH)                                                                                  \
  extern "C" __global__ void __launch_bounds__(384, 1) NAME##_128x##WIDTH(                                            \
      const __grid_constant__ TensorMap left, const __grid_constant__ TensorMap right, bf16* y, const bf16* acc,      \
      const bf16* bias, int rows, int cols, int inner, long long ld) {                                                \
    GemmJob job = {};                                                                                                 \
    job.rows = rows, job.cols = cols, job.inner = inner;                                                              \
    job.y = y, job.acc = acc, job.bias = bias, job.ld = ld;                                                           \
    gemm<FORM, WIDTH>(&left, &right, job, Tree());                                                                    \
  }
#define GEMM_LEAVES(WIDTH)                                                                                            \
  extern "C" __global__ void __launch_bounds__(384, 1) gemm_tn_f32_128x##WIDTH(                                       \
      const __grid_constant__ TensorMap left, const __grid_constant__ TensorMap right, float* levels,                 \
      long long level_len, float* held, int rows, int cols, int leaf_rows, const __grid_constant__ Tree tree,         \
      int subtrees, long long subtree_stride, int merge, int store) {                                                 \
    GemmJob job = {};                                                                                                 \
    job.rows = rows, job.cols = cols, job.inner = leaf_rows;                                                          \
    job.levels = levels, job.held = held, job.level_len = level_len, job.subtree_stride = subtree_stride;             \
    job.subtrees = subtrees, job.merge = merge, job.store = store, job.leaves = 1;                                    \
    for (int i = 0; i < tree.depth; ++i) job.leaves *= tree.radices[i];                                               \
    gemm<Form::TN, WIDTH>(&left, &right, job, tree);                                                                  \
  }
#define GEMM(WIDTH)                               \
  GEMM_ROWS(gemm_nt_bf16, Form::NT, WIDTH)        \
  GEMM_ROWS(gemm_nn_bf16, Form::NN, WIDTH)        \
  GEMM_LEAVES(WIDTH)
GEMM(256)
GEMM(192)
GEMM(128)
#undef GEMM
#undef GEMM_ROWS
#undef GEMM_LEAVES
