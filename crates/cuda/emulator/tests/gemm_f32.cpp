// Products of f32 matrices.
#include "../../kernels/gemm_f32.cu"
#include "../test.h"
#include "gemm_reference.h"

constexpr int BYTES = 0;

static dim3 blocks_for(int rows, int cols, int subtrees) {
  int tiles = (rows + 127) / 128 * ((cols + 127) / 128) * subtrees, most = ON_DEVICE ? 264 : 3;
  return dim3(unsigned(tiles < most ? tiles : most));
}

static void multiply(bool transposed, const float* x, const float* w, float* y, const float* acc, const float* bias,
                     int rows, int cols, int inner, int ld, int ld_y) {
  auto kernel = transposed ? gemm_nt_f32 : gemm_nn_f32;
  START(kernel, blocks_for(rows, cols, 1), dim3(256), BYTES, x, w, y, acc, bias, rows, cols, inner, (long long)ld,
        (long long)ld_y);
  finish_launch();
}

static void multiply_leaves(const float* dy, const float* x, float* levels, float* held, int out, int in, int leaf_rows,
                            const Tree& tree, int subtrees, size_t subtree_stride, int merge, int store) {
  auto kernel = gemm_tn_f32;
  START(kernel, blocks_for(out, in, subtrees), dim3(256), BYTES, dy, x, levels, (long long)out * in, held, out, in,
        leaf_rows, tree, subtrees, (long long)subtree_stride, merge, store);
  finish_launch();
}

static void test_rows(bool transposed, int rows, int cols, int inner, int pad, uint64_t seed) {
  Random random(seed);
  int ld = inner + pad, ld_y = cols + pad;
  auto x = random_values<float>(random, size_t(rows) * ld), w = random_values<float>(random, size_t(cols) * inner);
  auto acc = random_values<float>(random, size_t(rows) * ld_y), bias = random_values<float>(random, size_t(cols));
  Buffer<float> dx(x), dw(w), dacc(acc), dbias(bias);
  auto product = reference_rows(transposed, x, w, rows, cols, inner, ld);
  for (int variant = 0; variant < 3; ++variant) {
    bool with_acc = variant > 0, with_bias = variant == 1;
    std::vector<double> expected(size_t(rows) * cols);
    for (size_t i = 0; i < expected.size(); ++i) {
      size_t row = i / size_t(cols), col = i % size_t(cols);
      expected[i] = product[i] + (with_acc ? number(acc[row * size_t(ld_y) + col]) : 0) + (with_bias ? number(bias[col]) : 0);
    }
    std::string name = (transposed ? "f32 nt " : "f32 nn ") + std::to_string(rows) + " x " + std::to_string(cols) + " x " +
                       std::to_string(inner) + (with_acc ? " acc" : "") + (with_bias ? " bias" : "") +
                       (variant == 2 ? " in place" : "") + " seed " + std::to_string(seed);
    Buffer<float> y(acc);
    if (variant != 2) y.poison();
    const float *with = with_acc ? variant == 2 ? y.ptr() : dacc.ptr() : nullptr, *more = with_bias ? dbias.ptr() : nullptr;
    multiply(transposed, dx, dw, y, with, more, rows, cols, inner, ld, ld_y);
    auto out = without_padding(y.read(), rows, cols, ld_y);
    check(name, out, expected, tolerance<float>());
    if (variant != 1) continue;
    Buffer<float> apart(size_t(rows) * ld_y);
    int cut = 1 + int(random.next() % uint64_t(rows));
    for (int part = 0; part < 2; ++part) {
      size_t from = size_t(part * cut);
      int count = part ? rows - cut : cut;
      if (count == 0) continue;
      multiply(transposed, dx + from * ld, dw, apart + from * ld_y, dacc + from * ld_y, more, count, cols, inner, ld, ld_y);
    }
    check_same(name + ", rows apart", without_padding(apart.read(), rows, cols, ld_y), out);
  }
}

static void test_leaves(int out, int in, int leaf_rows, const Tree& tree, int merge, int store, uint64_t seed) {
  Random random(seed);
  int leaves = leaves_of(tree);
  size_t len = size_t(out) * in, rows = size_t(leaves) * leaf_rows;
  auto dy = random_values<float>(random, rows * out), x = random_values<float>(random, rows * in);
  auto levels = random_values<float>(random, 3 * len);
  std::vector<double> expected = reference_leaves(dy, x, leaves, out, in, leaf_rows);
  for (int l = 0; l < merge; ++l) {
    for (size_t i = 0; i < len; ++i) expected[i] += levels[size_t(l) * len + i];
  }
  std::string name = "f32 tn " + std::to_string(out) + " x " + std::to_string(in) + " of " + name_of(tree) + " x " +
                     std::to_string(leaf_rows) + " merge " + std::to_string(merge) + " store " + std::to_string(store) +
                     " seed " + std::to_string(seed);
  Buffer<float> ddy(dy), dx(x), to(levels);
  Buffer<float> held(size_t(blocks_for(out, in, 1).x) * tree.depth * 128 * 128);
  multiply_leaves(ddy, dx, to, held, out, in, leaf_rows, tree, 1, 0, merge, store);
  auto all = to.read();
  std::vector<float> result(all.begin() + store * long(len), all.begin() + (store + 1) * long(len));
  check(name, result, expected, tolerance<float>());
  auto before = levels;
  std::copy(result.begin(), result.end(), before.begin() + store * long(len));
  check_same(name + ", other levels", all, before);
  Buffer<float> parts(size_t(leaves) * len);
  multiply_leaves(ddy, dx, parts, nullptr, out, in, leaf_rows, Tree{}, leaves, len, 0, 0);
  check_same(name + ", leaves apart", fold_leaves(parts.read(), tree, levels, merge, len), result);
}

// Products that are symmetric: of a matrix with itself, and of matrices that commute; the mirror image has its bits.
static void test_symmetric(bool transposed, int side, int inner, uint64_t seed) {
  Random random(seed);
  auto x = random_values<float>(random, size_t(side) * inner), w = x;
  if (!transposed) {
    // Polynomials in one matrix commute: here a symmetric one, and its multiple.
    inner = side;
    x.assign(size_t(side) * side, 0.0f);
    for (int i = 0; i < side; ++i) {
      for (int j = 0; j <= i; ++j) x[size_t(i) * side + j] = x[size_t(j) * side + i] = float(random.unit());
    }
    w = x;
    for (auto& v : w) v *= 3.0f;
  }
  Buffer<float> dx(x), dw(w), out(size_t(side) * side);
  auto kernel = transposed ? symmetric_nt_f32 : symmetric_nn_f32;
  int across = (side + 127) / 128, tiles = across * (across + 1) / 2, most = ON_DEVICE ? 264 : 2;
  START(kernel, dim3(unsigned(tiles < most ? tiles : most)), dim3(256), BYTES, dx, dw, out, side, inner);
  finish_launch();
  auto found = out.read(), mirrored = found;
  for (int i = 0; i < side; ++i) {
    for (int j = 0; j < i; ++j) mirrored[size_t(j) * side + i] = found[size_t(i) * side + j];
  }
  std::string name = std::string("f32 symmetric ") + (transposed ? "nt " : "nn ") + std::to_string(side) + " x " +
                     std::to_string(inner) + " seed " + std::to_string(seed);
  check(name, found, reference_rows(transposed, x, w, side, side, inner, inner), tolerance<float>());
  check_same(name + ", mirrored", found, mirrored);
}

int main() {
#ifdef PHALANX_ON_DEVICE
  for (bool transposed : {true, false}) test_rows(transposed, 1000, 520, 1024, 0, 1);
  test_leaves(768, 520, 250, Tree{2, {2, 2}}, 2, 0, 1);
#endif
  for_seeds(2, [](uint64_t seed) {
    for (bool transposed : {true, false}) {
      test_rows(transposed, 1, 1, 1, 0, seed);
      test_rows(transposed, 131, 260, 36, 8, seed);
      test_rows(transposed, 30, 133, 77, 1, seed);
    }
    test_symmetric(true, 1, 3, seed);
    test_symmetric(true, 150, 37, seed);
    test_symmetric(false, 137, 0, seed);
    test_leaves(5, 3, 1, Tree{}, 0, 0, seed);
    test_leaves(136, 140, 40, Tree{1, {2}}, 1, 0, seed);
    test_leaves(31, 29, 21, Tree{2, {3, 2}}, 2, 2, seed);
    test_leaves(8, 8, 3, Tree{3, {2, 3, 2}}, 1, 1, seed);
  });
  return finish();
}
