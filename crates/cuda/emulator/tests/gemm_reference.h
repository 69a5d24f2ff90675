// Products in double precision, trees in f32, and maps of matrices.
#pragma once
#include <array>
#include <functional>
#ifdef PHALANX_ON_DEVICE
#include <cuda.h>
#define START(kernel, grid, block, shared_bytes, ...)                                                               \
  do {                                                                                                              \
    must(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)(shared_bytes)), "memory"); \
    kernel<<<grid, block, shared_bytes>>>(__VA_ARGS__);                                                             \
    must(cudaGetLastError(), "start");                                                                              \
  } while (0)
inline void finish_launch() { must(cudaDeviceSynchronize(), "run"); }
#else
#define START(kernel, grid, block, shared_bytes, ...) LAUNCH(kernel, grid, block, size_t(shared_bytes), __VA_ARGS__)
inline void finish_launch() {}
#endif

// Of bf16, in boxes of box_rows x 64 with the 128-byte swizzle; strides are bytes, of all dims but the first.
inline TensorMap tensor_map(const uint16_t* at, std::array<int, 3> dims, std::array<long long, 2> strides, int box_rows) {
  TensorMap map;
#ifdef PHALANX_ON_DEVICE
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  must(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result), "find");
  cuuint64_t extents[] = {cuuint64_t(dims[0]), cuuint64_t(dims[1]), cuuint64_t(dims[2])};
  cuuint64_t steps[] = {cuuint64_t(strides[0]), cuuint64_t(strides[1])};
  cuuint32_t box[] = {64, cuuint32_t(box_rows), 1}, every[] = {1, 1, 1};
  auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  CUresult encoded = encode(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void*)at, extents,
                            steps, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (encoded != CUDA_SUCCESS) {
    std::printf("cuTensorMapEncodeTiled: %d\n", int(encoded));
    std::exit(99);
  }
#else
  cpu::MapFields fields = {};
  fields.base = reinterpret_cast<uint64_t>(at);
  fields.rank = 3;
  fields.swizzle = 3;
  for (size_t i = 0; i < 3; ++i) fields.dims[i] = uint64_t(dims[i]);
  for (size_t i = 0; i < 2; ++i) fields.strides[i] = uint64_t(strides[i]);
  fields.box[0] = 64, fields.box[1] = uint16_t(box_rows), fields.box[2] = 1;
  std::memcpy(&map, &fields, sizeof map);
#endif
  return map;
}

template <class T> std::vector<T> without_padding(const std::vector<T>& all, int rows, int cols, int ld) {
  std::vector<T> out;
  for (int r = 0; r < rows; ++r) out.insert(out.end(), all.begin() + long(r) * ld, all.begin() + long(r) * ld + cols);
  return out;
}

// x [rows, inner] w^T with w [cols, inner], or x w with w [inner, cols].
template <class T>
std::vector<double> reference_rows(bool transposed, const std::vector<T>& x, const std::vector<T>& w, int rows, int cols,
                                   int inner, int ld) {
  auto left = numbers_of(x), right = numbers_of(w);
  std::vector<double> out(size_t(rows) * size_t(cols));
  std::vector<double> column(static_cast<size_t>(inner));
  for (int c = 0; c < cols; ++c) {
    for (int k = 0; k < inner; ++k) column[size_t(k)] = right[transposed ? size_t(c) * inner + k : size_t(k) * cols + c];
    for (int r = 0; r < rows; ++r) {
      const double* row = left.data() + size_t(r) * size_t(ld);
      double sums[4] = {};
      for (int k = 0; k < inner; ++k) sums[k % 4] += row[k] * column[size_t(k)];
      out[size_t(r) * cols + c] = sums[0] + sums[1] + sums[2] + sums[3];
    }
  }
  return out;
}

// The sum over leaves of dy^T x.
template <class T>
std::vector<double> reference_leaves(const std::vector<T>& dy, const std::vector<T>& x, int leaves, int out, int in,
                                     int leaf_rows) {
  auto left = numbers_of(dy), right = numbers_of(x);
  std::vector<double> sums(size_t(out) * size_t(in));
  for (size_t n = 0; n < size_t(leaves) * size_t(leaf_rows); ++n) {
    for (size_t o = 0; o < size_t(out); ++o) {
      double d = left[n * size_t(out) + o];
      const double* row = right.data() + n * size_t(in);
      double* to = sums.data() + o * size_t(in);
      for (size_t i = 0; i < size_t(in); ++i) to[i] += d * row[i];
    }
  }
  return sums;
}

inline int leaves_of(const Tree& tree) {
  int leaves = 1;
  for (int i = 0; i < tree.depth; ++i) leaves *= tree.radices[i];
  return leaves;
}
inline std::string name_of(const Tree& tree) {
  std::string name = "[";
  for (int i = 0; i < tree.depth; ++i) name += (i ? ", " : "") + std::to_string(tree.radices[i]);
  return name + "]";
}

// Leaves [leaves, len] up the tree, level by level, and to the outer levels.
inline std::vector<float> fold_leaves(std::vector<float> parts, const Tree& tree, const std::vector<float>& levels,
                                      int merge, size_t len) {
  for (int d = 0; d < tree.depth; ++d) {
    size_t radix = size_t(tree.radices[d]);
    std::vector<float> nodes(parts.size() / radix);
    for (size_t node = 0; node < nodes.size() / len; ++node) {
      for (size_t i = 0; i < len; ++i) {
        float sum = parts[node * radix * len + i];
        for (size_t r = 1; r < radix; ++r) sum = sum + parts[(node * radix + r) * len + i];
        nodes[node * len + i] = sum;
      }
    }
    parts = nodes;
  }
  for (int l = 0; l < merge; ++l) {
    for (size_t i = 0; i < len; ++i) parts[i] = levels[size_t(l) * len + i] + parts[i];
  }
  return parts;
}
