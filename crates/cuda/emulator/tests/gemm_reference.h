// Products in double precision, trees in f32, and how their kernels start.
#pragma once
#include <functional>
#ifdef PHALANX_ON_DEVICE
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
