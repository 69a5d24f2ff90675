// Gradients: sums of leaves in the order of a tree, met by the levels of the outer tree.
//
//   fold_*: grid ceil(level_len / 1024) or any, 256 threads; accumulate_f32: any grid, 256 threads
//   embed_first, then embed_list: a thread for each of n tokens; embed_rows_* after them: grid n, a block of 32 to 256
//     threads (a multiple of 32); embed_fold: grid vocab_rows, any such block
#include "device.h"
#include "lanes.h"

// Eight neighbouring sums of a thread.
struct Sums {
  float v[8];
};

__device__ __forceinline__ Sums plus(Sums a, const Sums& b) {
#pragma unroll
  for (int i = 0; i < 8; ++i) a.v[i] += b.v[i];
  return a;
}

// Up to four elements at `at` of `count`, 0 beyond.
__device__ __forceinline__ float4 get4(const float* x, long long at, long long count, bool wide) {
  if (wide && at + 4 <= count) return *(const float4*)(x + at);
  float v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = at + i < count ? x[at + i] : 0.0f;
  return make_float4(v[0], v[1], v[2], v[3]);
}
__device__ __forceinline__ float4 get4(const bf16* x, long long at, long long count, bool wide) {
  if (wide && at + 4 <= count) {
    uint2 w = *(const uint2*)(x + at);
    return make_float4(__uint_as_float(w.x << 16), __uint_as_float(w.x & 0xffff0000u), __uint_as_float(w.y << 16),
                       __uint_as_float(w.y & 0xffff0000u));
  }
  float v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = at + i < count ? bf2f(x[at + i]) : 0.0f;
  return make_float4(v[0], v[1], v[2], v[3]);
}
__device__ __forceinline__ void put4(float* x, long long at, long long count, bool wide, float4 v) {
  if (wide && at + 4 <= count) {
    *(float4*)(x + at) = v;
    return;
  }
  const float all[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (at + i < count) x[at + i] = all[i];
  }
}

// The levels `r` meets, and where it ends.
__device__ __forceinline__ void merge_into(float* levels, long long level_len, long long at, long long count, bool wide,
                                           int merge, int store, float4 r) {
  for (int l = 0; l < merge; ++l) r = plus(get4(levels + l * level_len, at, count, wide), r);
  put4(levels + store * level_len, at, count, wide, r);
}

template <class T>
__device__ __forceinline__ void fold(const T* parts, long long leaf_stride, int parts_per_leaf, long long part_stride,
                                     long long len, float* levels, long long level_len, const Tree& tree, int merge,
                                     int store) {
  bool wide = aligned16(parts) && aligned16(levels) && ((leaf_stride | part_stride | level_len) & 3) == 0;
  long long step = (long long)gridDim.x * blockDim.x * 4;
  for (long long at = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 4; at < level_len; at += step) {
    auto leaf = [&](int i) {
      const T* from = parts + i * leaf_stride;
      float4 sum = get4(from, at, len, wide);
#pragma unroll 8
      for (int k = 1; k < parts_per_leaf; ++k) sum = plus(sum, get4(from + k * part_stride, at, len, wide));
      return sum;
    };
    float4 r;
    if (tree.depth <= SHALLOW) {
      r = sum_shallow<float4>(tree, leaf);
    } else {
      // One after another: what `sum_deep` holds of a whole four would not leave room for loads.
      auto one = [&](long long column) {
        return sum_deep<float>(tree, [&](int i) {
          const T* from = parts + i * leaf_stride + column;
          float sum = column < len ? as_f32(*from) : 0.0f;
#pragma unroll 1
          for (int k = 1; column < len && k < parts_per_leaf; ++k) sum += as_f32(from[k * part_stride]);
          return sum;
        });
      };
      r = make_float4(one(at), one(at + 1), one(at + 2), one(at + 3));
    }
    merge_into(levels, level_len, at, level_len, wide, merge, store, r);
  }
}

#define FOLD(T, S)                                                                                                   \
  extern "C" __global__ void __launch_bounds__(256, 4)                                                               \
      fold_##S(const T* parts, long long leaf_stride, int parts_per_leaf, long long part_stride, long long len,      \
               float* levels, long long level_len, const __grid_constant__ Tree tree, int merge, int store) {        \
    fold(parts, leaf_stride, parts_per_leaf, part_stride, len, levels, level_len, tree, merge, store);               \
  }
FOLD(bf16, bf16)
FOLD(float, f32)

// The gradient of positions [positions, dim] where a rank's rows of a sequence are two pieces of it, from `front` and from
// `back` on: a leaf is a sequence, and positions that no row has get +0.
template <class T>
__device__ __forceinline__ void pos_dw(const T* dy, float* levels, int positions, int dim, int sequence, int front,
                                       int back, const Tree& tree, int merge, int store) {
  int half = sequence / 2;
  each((long long)positions * dim, [&](long long at) {
    int position = (int)(at / dim), col = (int)(at % dim), row = position - front;
    if (row < 0 || row >= half) row = position < back || position >= back + sequence - half ? -1 : half + position - back;
    float v = sum_tree<float>(tree, [&](int leaf) {
      return row < 0 ? 0.0f : as_f32(dy[((long long)leaf * sequence + row) * dim + col]);
    });
    for (int l = 0; l < merge; ++l) v = levels[(long long)l * positions * dim + at] + v;
    levels[(long long)store * positions * dim + at] = v;
  });
}

#define POSITIONS(T, S)                                                                                             \
  extern "C" __global__ void __launch_bounds__(256)                                                                  \
      pos_dw_##S(const T* dy, float* levels, int positions, int dim, int sequence, int front, int back,              \
                 const __grid_constant__ Tree tree, int merge, int store) {                                          \
    pos_dw(dy, levels, positions, dim, sequence, front, back, tree, merge, store);                                   \
  }
POSITIONS(bf16, bf16)
POSITIONS(float, f32)

extern "C" __global__ void __launch_bounds__(256) accumulate_f32(const float* x, float* y, long long len) {
  bool wide = aligned16(x) && aligned16(y);
  long long step = (long long)gridDim.x * blockDim.x * 4;
  for (long long at = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 4; at < len; at += step) {
    put4(y, at, len, wide, plus(get4(y, at, len, wide), get4(x, at, len, wide)));
  }
}

// Ids looked at between two barriers: a word of a mask for each 32.
constexpr int SCAN = 8;
constexpr int MOST_WORDS = SCAN * 256 / 32;

// Sets `mask` to which of the ids from `base` to `end` are `id`, bit i of word w for base + 32 w + i.
__device__ __forceinline__ void find_ids(const uint32_t* ids, int base, int end, uint32_t id, uint32_t* mask) {
  int warps = (int)blockDim.x / 32;
#pragma unroll
  for (int j = 0; j < SCAN; ++j) {
    int at = base + j * (int)blockDim.x + (int)threadIdx.x;
    uint32_t word = __ballot_sync(~0u, at < end && ids[at] == id);
    if (threadIdx.x % 32 == 0) mask[j * warps + (int)threadIdx.x / 32] = word;
  }
  if (FAULT != 4) __syncthreads();
}

// Adds the rows of dy from `base` on that `word` has, in order; four are loaded at a time.
template <class T>
__device__ __forceinline__ void add_rows(Sums& sums, uint32_t word, int base, const T* dy, int column, int dim,
                                         bool wide) {
  while (word != 0) {
    Eight<T> rows[4];
    bool has[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      has[i] = word != 0;
      int row = base + __ffs((int)word) - 1;
      if (has[i]) rows[i] = get8(dy + (long long)row * dim, column, dim, wide);
      word &= word - 1;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float v[8];
      if (!has[i]) continue;
      rows[i].unpack(v);
#pragma unroll
      for (int j = 0; j < 8; ++j) sums.v[j] += v[j];
    }
  }
}

// Tokens of an id that a list holds beside the first; one with more of them is searched for.
constexpr int LISTED = 128;

// Until its sum is known, the row of an id's first token holds how many other tokens have the id, and which, in any
// order.
__device__ __forceinline__ int* list_of(float* rows, int token, int dim) {
  return (int*)(rows + (long long)token * dim);
}
__device__ __forceinline__ int list_len(int dim) { return min(LISTED, dim - 1); }

// Of vocab_rows, the row of a token's id; -1 if it is not here.
__device__ __forceinline__ int row_of(const uint32_t* ids, int token, int vocab0, int vocab_rows) {
  uint32_t row = ids[token] - (uint32_t)vocab0;
  return ids[token] >= (uint32_t)vocab0 && row < (uint32_t)vocab_rows ? (int)row : -1;
}

// Finds each id's first token; all bits of `map` are set before. Only integers meet atomically, whose order is no
// matter.
extern "C" __global__ void __launch_bounds__(256)
    embed_first(const uint32_t* ids, float* rows, int* map, int vocab0, int vocab_rows, int n, int dim) {
  int token = (int)(blockIdx.x * blockDim.x + threadIdx.x);
  if (token >= n) return;
  *list_of(rows, token, dim) = 0;
  int row = row_of(ids, token, vocab0, vocab_rows);
  if (row >= 0) atomicMin((uint32_t*)map + row, (uint32_t)token);
}

// Lists the other tokens.
extern "C" __global__ void __launch_bounds__(256)
    embed_list(const uint32_t* ids, float* rows, const int* map, int vocab0, int vocab_rows, int n, int dim) {
  int token = (int)(blockIdx.x * blockDim.x + threadIdx.x);
  int row = token < n ? row_of(ids, token, vocab0, vocab_rows) : -1;
  if (row < 0 || map[row] == token) return;
  int* list = list_of(rows, map[row], dim);
  int i = atomicAdd(list, 1);
  if (i < list_len(dim)) list[1 + i] = token;
}

// Adds the rows of dy of the tokens before `end`, from `next` on; four are loaded at a time.
template <class T>
__device__ __forceinline__ void add_listed(Sums& sums, const int* tokens, int& next, int count, int end, const T* dy,
                                           int column, int dim, bool wide) {
  while (next < count && tokens[next] < end) {
    Eight<T> rows[4];
    int taken = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (next + i < count && tokens[next + i] < end) {
        rows[i] = get8(dy + (long long)tokens[next + i] * dim, column, dim, wide);
        taken = i + 1;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float v[8];
      if (i >= taken) continue;
      rows[i].unpack(v);
#pragma unroll
      for (int j = 0; j < 8; ++j) sums.v[j] += v[j];
    }
    next += taken;
  }
}

// The block of an id's first token sums all of its tokens: in a leaf in their order, leaves by the tree. A leaf without
// the id counts as 0.
template <class T>
__device__ __forceinline__ void embed_rows(const uint32_t* ids, const T* dy, float* rows, const int* map, int vocab0,
                                           int vocab_rows, int leaf_rows, int dim, const Tree& tree, uint32_t* mask,
                                           int* found, int* tokens) {
  int token = (int)blockIdx.x, words = SCAN * (int)blockDim.x / 32, span = words * 32;
  uint32_t id = ids[token];
  int row = row_of(ids, token, vocab0, vocab_rows);
  if (row < 0 || map[row] != token) return;
  const int* list = list_of(rows, token, dim);
  int others = *list;
  bool listed = others <= list_len(dim);
  if (listed) {
    for (int i = (int)threadIdx.x; i < others; i += (int)blockDim.x) found[i] = list[1 + i];
    __syncthreads();
    if (threadIdx.x == 0) tokens[0] = token;
    for (int i = (int)threadIdx.x; i < others; i += (int)blockDim.x) {
      int before = 0;
      for (int j = 0; j < others; ++j) before += found[j] < found[i];
      tokens[1 + before] = found[i];
    }
  }
  // What the list holds is read before sums go where it is.
  if (FAULT != 6) __syncthreads();
  bool wide = dim % 8 == 0 && aligned16(dy);
  bool wide_rows = dim % 8 == 0 && aligned16(rows);
  for (int first = 0; first < dim; first += (int)blockDim.x * 8) {
    int column = first + (int)threadIdx.x * 8, next = 0;
    Sums r = sum_tree<Sums>(tree, [&](int leaf) {
      Sums sums = {};
      int end = (leaf + 1) * leaf_rows;
      if (listed) {
        add_listed(sums, tokens, next, others + 1, end, dy, column, dim, wide);
        return sums;
      }
      // What lies before the first token has none of them.
      for (int base = max(leaf * leaf_rows, token); base < end; base += span) {
        find_ids(ids, base, end, id, mask);
        for (int w = 0; w < words; ++w) add_rows(sums, mask[w], base + w * 32, dy, column, dim, wide);
        __syncthreads();
      }
      return sums;
    });
    put8(rows + (long long)token * dim, column, dim, wide_rows, r.v);
  }
}

#define EMBED_ROWS(T, S)                                                                                            \
  extern "C" __global__ void __launch_bounds__(256)                                                                 \
      embed_rows_##S(const uint32_t* ids, const T* dy, float* rows, const int* map, int vocab0, int vocab_rows,     \
                     int leaf_rows, int dim, const __grid_constant__ Tree tree) {                                   \
    SHARED_ARRAY(uint32_t, mask, MOST_WORDS);                                                                       \
    SHARED_ARRAY(int, found, LISTED);                                                                               \
    SHARED_ARRAY(int, tokens, LISTED + 1);                                                                          \
    embed_rows(ids, dy, rows, map, vocab0, vocab_rows, leaf_rows, dim, tree, mask, found, tokens);                  \
  }
EMBED_ROWS(bf16, bf16)
EMBED_ROWS(float, f32)

// Brings each row of the table what its id's tokens gave, or 0.
extern "C" __global__ void __launch_bounds__(256)
    embed_fold(const float* rows, const int* map, float* levels, int vocab_rows, int dim, int merge, int store) {
  int from = map[blockIdx.x];
  const float* row = rows + (long long)(from < 0 ? 0 : from) * dim;
  bool wide = dim % 4 == 0 && aligned16(rows) && aligned16(levels);
  float* to = levels + (long long)blockIdx.x * dim;
  for (int at = (int)threadIdx.x * 4; at < dim; at += (int)blockDim.x * 4) {
    float4 r = from < 0 ? make_float4(0, 0, 0, 0) : get4(row, at, dim, wide);
    merge_into(to, (long long)vocab_rows * dim, at, dim, wide, merge, store, r);
  }
}
