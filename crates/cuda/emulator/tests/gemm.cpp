// Products of bf16 matrices with wgmma.
#include "../../kernels/gemm_wgmma.cu"
#include "../test.h"
#include "gemm_reference.h"
#include "tensor_map.h"

struct Kernels {
  int width, bytes, held_from;
  void (*nt)(const TensorMap, const TensorMap, bf16*, const bf16*, const bf16*, int, int, int, long long);
  void (*nn)(const TensorMap, const TensorMap, bf16*, const bf16*, const bf16*, int, int, int, long long);
  void (*tn)(const TensorMap, const TensorMap, float*, long long, float*, int, int, int, const Tree, int, long long, int,
             int);
};
#define KERNELS(W) \
  Kernels { W, GemmTile<W>::BYTES, GemmTile<W>::HOLDS ? 1 : 0, gemm_nt_bf16_128x##W, gemm_nn_bf16_128x##W, gemm_tn_f32_128x##W }
static const Kernels ALL[] = {KERNELS(256), KERNELS(192), KERNELS(128)};

// Persistent blocks: as many as there are multiprocessors; few in the emulator, so that each takes several tiles.
static unsigned blocks_for(const Kernels& k, int rows, int cols, int subtrees) {
  int tiles = (rows + 127) / 128 * ((cols + k.width - 1) / k.width) * subtrees, most = 2;
#ifdef PHALANX_ON_DEVICE
  must(cudaDeviceGetAttribute(&most, cudaDevAttrMultiProcessorCount, 0), "attribute");
#endif
  return unsigned(tiles < most ? tiles : most);
}

static TensorMap matrix(const bf16* at, int rows, int cols, int ld, int box_rows) {
  return tensor_map(at, {cols, rows, 1}, {2ll * ld, 2ll * ld * rows}, box_rows);
}

// y = x w^T, or x w: what starts it.
static std::function<void()> rows_job(const Kernels& k, bool transposed, const bf16* x, const bf16* w, bf16* y,
                                      const bf16* acc, const bf16* bias, int rows, int cols, int inner, int ld,
                                      int ld_y) {
  TensorMap left = matrix(x, rows, inner, ld, 128);
  TensorMap right = transposed ? matrix(w, cols, inner, inner, k.width) : matrix(w, inner, cols, cols, 64);
  auto kernel = transposed ? k.nt : k.nn;
  return [=] {
    START(kernel, dim3(blocks_for(k, rows, cols, 1)), dim3(384), k.bytes, left, right, y, acc, bias, rows, cols, inner,
          (long long)ld_y);
  };
}
static std::function<void()> leaves_job(const Kernels& k, const bf16* dy, const bf16* x, float* levels, float* held,
                                        int out, int in, int leaf_rows, const Tree& tree, int subtrees,
                                        long long subtree_stride, int merge, int store) {
  int leaves = leaves_of(tree) * subtrees;
  auto map = [&](const bf16* at, int cols) {
    return tensor_map_3d(at, cols, leaf_rows, leaves, 64);
  };
  TensorMap left = map(dy, out), right = map(x, in);
  auto kernel = k.tn;
  return [=] {
    START(kernel, dim3(blocks_for(k, out, in, subtrees)), dim3(384), k.bytes, left, right, levels, (long long)out * in,
          held, out, in, leaf_rows, tree, subtrees, subtree_stride, merge, store);
  };
}

template <class... A> void multiply(const A&... a) {
  rows_job(a...)();
  finish_launch();
}
template <class... A> void multiply_leaves(const A&... a) {
  leaves_job(a...)();
  finish_launch();
}

static size_t held_len(const Kernels& k, int out, int in, const Tree& tree, int subtrees) {
  int levels = tree.depth - k.held_from;
  return size_t(blocks_for(k, out, in, subtrees)) * size_t(levels > 0 ? levels : 0) * 128 * size_t(k.width);
}

// Both forms of a product with rows of the result: against doubles, in place, alike for all tiles and for rows apart.
static void test_rows(bool transposed, int rows, int cols, int inner, int pad, uint64_t seed) {
  Random random(seed);
  int ld = inner + pad, ld_y = cols + pad;
  auto x = random_values<bf16>(random, size_t(rows) * ld), w = random_values<bf16>(random, size_t(cols) * inner);
  auto acc = random_values<bf16>(random, size_t(rows) * ld_y), bias = random_values<bf16>(random, size_t(cols));
  Buffer<bf16> dx(x), dw(w), dacc(acc), dbias(bias);
  auto product = reference_rows(transposed, x, w, rows, cols, inner, ld);
  for (int variant = 0; variant < 3; ++variant) {
    bool with_acc = variant > 0, with_bias = variant == 1 && transposed;
    std::vector<double> expected(size_t(rows) * cols);
    for (size_t i = 0; i < expected.size(); ++i) {
      size_t row = i / size_t(cols), col = i % size_t(cols);
      expected[i] = product[i] + (with_acc ? number(acc[row * size_t(ld_y) + col]) : 0) + (with_bias ? number(bias[col]) : 0);
    }
    std::vector<bf16> first;
    for (const auto& k : ALL) {
      std::string name = (transposed ? "nt " : "nn ") + std::to_string(rows) + " x " + std::to_string(cols) + " x " +
                         std::to_string(inner) + " tile " + std::to_string(k.width) + (with_acc ? " acc" : "") +
                         (with_bias ? " bias" : "") + (variant == 2 ? " in place" : "") + " seed " + std::to_string(seed);
      Buffer<bf16> y(acc);
      if (variant != 2) y.poison();
      multiply(k, transposed, dx, dw, y, with_acc ? variant == 2 ? y.ptr() : dacc.ptr() : (const bf16*)nullptr,
               with_bias ? dbias.ptr() : (const bf16*)nullptr, rows, cols, inner, ld, ld_y);
      auto out = without_padding(y.read(), rows, cols, ld_y);
      check(name, out, expected, tolerance<bf16>());
      if (first.empty()) first = out;
      check_same(name + ", as the first tile", out, first);
      if (variant != 1) continue;
      // In two launches, the rows cut anywhere.
      Buffer<bf16> apart(size_t(rows) * ld_y);
      int cut = 1 + int(random.next() % uint64_t(rows));
      for (int part = 0; part < 2; ++part) {
        int from = part * cut, count = part ? rows - cut : cut;
        if (count == 0) continue;
        multiply(k, transposed, dx + size_t(from) * ld, dw, apart + size_t(from) * ld_y, dacc + size_t(from) * ld_y,
                 with_bias ? dbias.ptr() : (const bf16*)nullptr, count, cols, inner, ld, ld_y);
      }
      check_same(name + ", rows apart", without_padding(apart.read(), rows, cols, ld_y), first);
    }
  }
}

// The gradient of a weight: against doubles, and alike for all tiles, and for subtrees by themselves.
static void test_leaves(int out, int in, int leaf_rows, const Tree& tree, int merge, int store, uint64_t seed) {
  Random random(seed);
  int leaves = leaves_of(tree);
  size_t len = size_t(out) * in, rows = size_t(leaves) * leaf_rows;
  auto dy = random_values<bf16>(random, rows * out), x = random_values<bf16>(random, rows * in);
  auto levels = random_values<float>(random, 3 * len);
  Buffer<bf16> ddy(dy), dx(x);
  std::vector<double> expected = reference_leaves(dy, x, leaves, out, in, leaf_rows);
  for (int l = 0; l < merge; ++l) {
    for (size_t i = 0; i < len; ++i) expected[i] += levels[size_t(l) * len + i];
  }
  std::vector<float> first;
  for (const auto& k : ALL) {
    std::string name = "tn " + std::to_string(out) + " x " + std::to_string(in) + " of " + name_of(tree) + " x " +
                       std::to_string(leaf_rows) + " merge " + std::to_string(merge) + " store " + std::to_string(store) +
                       " tile " + std::to_string(k.width) + " seed " + std::to_string(seed);
    Buffer<float> to(levels), held(held_len(k, out, in, tree, 1));
    multiply_leaves(k, ddy, dx, to, held, out, in, leaf_rows, tree, 1, 0, merge, store);
    auto all = to.read();
    std::vector<float> result(all.begin() + store * long(len), all.begin() + (store + 1) * long(len));
    check(name, result, expected, 2e-5);
    if (first.empty()) first = result;
    check_same(name + ", as the first tile", result, first);
    auto before = levels;
    std::copy(result.begin(), result.end(), before.begin() + store * long(len));
    check_same(name + ", other levels", all, before);

    // Leaf by leaf into parts, and then up the tree one after another in f32: what the kernel must have done.
    Buffer<float> parts(size_t(leaves) * len);
    multiply_leaves(k, ddy, dx, parts, (float*)nullptr, out, in, leaf_rows, Tree{}, leaves, (long long)len, 0, 0);
    check_same(name + ", leaves apart", fold_leaves(parts.read(), tree, levels, merge, len), result);
  }
}

#ifdef PHALANX_ON_DEVICE
#include "gemm_bench.h"
#endif

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "--bytes") {
    for (const auto& k : ALL) std::printf("128x%d: %d bytes\n", k.width, k.bytes);
    return 0;
  }
#ifdef PHALANX_ON_DEVICE
  if (argc > 1 && std::string(argv[1]) == "--bench") return bench_gemm();
  for (bool transposed : {true, false}) {
    test_rows(transposed, 1024, 768, 768, 0, 1);
    test_rows(transposed, 1000, 1032, 600, 8, 2);
    test_rows(transposed, 1500, 520, 1024, 0, 3);
  }
  test_leaves(768, 776, 500, Tree{2, {2, 2}}, 2, 0, 1);
  test_leaves(1024, 768, 256, Tree{1, {4}}, 1, 0, 2);
  test_leaves(520, 2048, 512, Tree{}, 0, 0, 3);
#endif
  for_seeds(2, [](uint64_t seed) {
    for (bool transposed : {true, false}) {
      test_rows(transposed, 1, 8, 8, 0, seed);
      test_rows(transposed, 140, 272, 200, 8, seed);
    }
    test_rows(true, 64, 136, 840, 0, seed);
    test_leaves(8, 8, 1, Tree{}, 0, 0, seed);
    test_leaves(136, 200, 72, Tree{1, {2}}, 1, 0, seed);
    test_leaves(72, 264, 40, Tree{2, {2, 2}}, 2, 2, seed);
    test_leaves(64, 64, 130, Tree{2, {3, 2}}, 0, 1, seed);
    test_leaves(64, 64, 10, Tree{3, {2, 3, 2}}, 1, 1, seed);
  });
  return finish();
}
