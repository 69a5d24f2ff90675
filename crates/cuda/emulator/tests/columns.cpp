// Column sums over rows and over heads against their formulas, and folds with the bits of the contract.
#include "../../kernels/columns.cu"
#include "rows.h"

// Column sums: `leaves` leaves of `leaf_rows` rows.
template <class T> void column_sums(int leaves, int leaf_rows, int dim, int chunk, uint64_t seed) {
  Random r(seed);
  int n = leaves * leaf_rows, per_leaf = (leaf_rows + chunk - 1) / chunk, parts = leaves * per_leaf;
  auto x = random_values<T>(r, n * dim), dy = random_values<T>(r, n * dim);
  auto stats = random_values<float>(r, 2 * n, 0.5, 1);
  Numbers64 rms(parts * dim), layer(parts * dim), bias(parts * dim);
  for (int i = 0; i < n; ++i) {
    int part = i / leaf_rows * per_leaf + i % leaf_rows / chunk;
    for (int j = 0; j < dim; ++j) {
      double g = number(dy[i * dim + j]), v = number(x[i * dim + j]);
      rms[part * dim + j] += g * v * stats[i];
      layer[part * dim + j] += g * (v - stats[i]) * stats[n + i];
      bias[part * dim + j] += g;
    }
  }
  Buffer<T> dx_(x), ddy(dy);
  Buffer<float> st(stats), a(parts * dim), b(parts * dim), c(parts * dim), d(parts * dim);
  dim3 grid((dim + 63) / 64, parts), block(256);
  auto is = name<T>("column sums", n, dim, seed);
  RUN(T, rms_norm_dw, grid, block, ddy.ptr(), dx_.ptr(), st.ptr(), a.ptr(), dim, chunk, leaf_rows);
  check(is + " rms", a.read(), rms, 3e-6);
  // Rows between others: the same bits.
  int ld = dim + 8;
  std::vector<T> spread(n * ld);
  std::vector<float> far(2 * n);
  for (int i = 0; i < n; ++i) {
    std::copy(x.begin() + i * dim, x.begin() + (i + 1) * dim, spread.begin() + i * ld + 8);
    far[2 * i + 1] = stats[i];
  }
  Buffer<T> apart(spread);
  Buffer<float> st_apart(far), e(parts * dim);
  RUN(T, latent_norm_dw, grid, block, ddy.ptr(), apart + 8, ld, st_apart + 1, 2, e.ptr(), dim, chunk, leaf_rows);
  check_same(is + " rms of rows apart", e.read(), a.read());
  RUN(T, layer_norm_dw, grid, block, ddy.ptr(), dx_.ptr(), st.ptr(), b.ptr(), c.ptr(), n, dim, chunk, leaf_rows);
  check(is + " layer", b.read(), layer, 3e-6);
  check(is + " layer bias", c.read(), bias, 3e-6);
  RUN(T, bias_dw, grid, block, ddy.ptr(), d.ptr(), dim, chunk, leaf_rows);
  check(is + " bias", d.read(), bias, 3e-6);
  // The last leaf alone has the same bits.
  Buffer<T> last(std::vector<T>(dy.end() - leaf_rows * dim, dy.end()));
  Buffer<float> alone(per_leaf * dim);
  RUN(T, bias_dw, dim3(grid.x, per_leaf), block, last.ptr(), alone.ptr(), dim, chunk, leaf_rows);
  auto all = d.read();
  check_same(is + " alone", alone.read(), std::vector<float>(all.end() - per_leaf * dim, all.end()));
}

// Gradients of sinks by parts.
template <class T> void sink_sums(int leaves, int leaf_rows, int heads, int dim, int chunk, uint64_t seed) {
  Random r(seed);
  int n = leaves * leaf_rows, per_leaf = (leaf_rows + chunk - 1) / chunk, parts = leaves * per_leaf;
  auto o = random_values<T>(r, n * heads * dim), d_o = random_values<T>(r, n * heads * dim);
  auto sinks = random_values<T>(r, heads);
  auto lse = random_values<float>(r, n * heads, 1, 2);
  Numbers64 expected(parts * heads);
  for (int i = 0; i < n; ++i) {
    for (int h = 0; h < heads; ++h) {
      double dot = 0;
      for (int j = 0; j < dim; ++j) dot += number(o[(i * heads + h) * dim + j]) * number(d_o[(i * heads + h) * dim + j]);
      double p = std::exp(number(sinks[h]) - lse[(i / leaf_rows * heads + h) * leaf_rows + i % leaf_rows]);
      expected[(i / leaf_rows * per_leaf + i % leaf_rows / chunk) * heads + h] -= p * dot;
    }
  }
  Buffer<T> do_(o), dd(d_o), ds(sinks);
  Buffer<float> dl(lse), out(parts * heads);
  RUN(T, sink_dw, dim3(heads, parts), dim3(256), dd.ptr(), do_.ptr(), dl.ptr(), ds.ptr(), out.ptr(), leaf_rows, heads, 0,
      dim, chunk, leaf_rows);
  check(name<T>("sinks", n, dim, seed), out.read(), expected, 3e-6);
  // The same heads among others.
  std::vector<T> more(heads + 3);
  std::copy(sinks.begin(), sinks.end(), more.begin() + 2);
  Buffer<T> all(more);
  Buffer<float> wide(parts * (heads + 3));
  RUN(T, sink_dw, dim3(heads + 3, parts), dim3(256), dd.ptr(), do_.ptr(), dl.ptr(), all.ptr(), wide.ptr(), leaf_rows, heads,
      2, dim, chunk, leaf_rows);
  std::vector<float> among(parts * (heads + 3)), own = out.read();
  for (int p = 0; p < parts; ++p) std::copy(own.begin() + p * heads, own.begin() + (p + 1) * heads, among.begin() + p * (heads + 3) + 2);
  check_same(name<T>("sinks among others", n, dim, seed), wide.read(), among);
}

// Sums over the heads of packed rows.
template <class T> void head_sums(int leaves, int leaf_rows, int heads, int kv, int dim, int chunk, uint64_t seed) {
  Random r(seed);
  int n = leaves * leaf_rows, normed = heads + kv, ld = (normed + kv) * dim;
  int per_leaf = (leaf_rows + chunk - 1) / chunk, parts = leaves * per_leaf;
  auto qkv = random_values<T>(r, n * ld), dy = random_values<T>(r, n * ld);
  auto rstd = random_values<float>(r, n * normed, 0.5, 1);
  Numbers64 q(parts * dim), k(parts * dim);
  for (int i = 0; i < n; ++i) {
    int part = i / leaf_rows * per_leaf + i % leaf_rows / chunk;
    for (int h = 0; h < normed; ++h) {
      for (int j = 0; j < dim; ++j) {
        int at = i * ld + h * dim + j;
        (h < heads ? q : k)[part * dim + j] += number(dy[at]) * number(qkv[at]) * rstd[i * normed + h];
      }
    }
  }
  Buffer<T> in(qkv), ddy(dy);
  Buffer<float> st(rstd), a(parts * dim), b(parts * dim);
  RUN(T, qk_norm_dw, dim3((dim + 63) / 64, parts), dim3(256), ddy.ptr(), in.ptr(), st.ptr(), a.ptr(), b.ptr(), heads, kv,
      dim, chunk, leaf_rows);
  auto is = name<T>("head sums", n, dim, seed);
  check(is + " q", a.read(), q, 3e-6);
  check(is + " k", b.read(), k, 3e-6);
}

static Tree tree_of(const std::vector<int>& radices) {
  Tree tree{};
  for (int r : radices) tree.radices[tree.depth++] = r;
  return tree;
}

// The last radix is the root's.
static float root_of(std::vector<int> radices, const float* leaves) {
  if (radices.empty()) return *leaves;
  int children = radices.back(), below = 1;
  radices.pop_back();
  for (int r : radices) below *= r;
  float sum = root_of(radices, leaves);
  for (int c = 1; c < children; ++c) sum += root_of(radices, leaves + c * below);
  return sum;
}

static void folds(const std::vector<int>& radices, int per_leaf, int dim, int both, uint64_t seed) {
  Random r(seed);
  int leaves = 1;
  for (int radix : radices) leaves *= radix;
  int len = leaves * per_leaf * dim;
  auto parts = random_values<float>(r, 2 * len), held = random_values<float>(r, 6 * dim);
  int merge[] = {int(seed % 6), int(seed % 3)}, store[] = {int(seed % 5), 1};
  Buffer<float> dparts(parts), a(held), b(held);
  LAUNCH(fold_columns, dim3((dim + 31) / 32, 1 + both), dim3(256), 0, dparts.ptr(), per_leaf, dim, a.ptr(), b.ptr(),
         tree_of(radices), merge[0], store[0], merge[1], store[1]);
  for (int second = 0; second < 2; ++second) {
    auto expected = held;
    for (int j = 0; j < dim && (!second || both); ++j) {
      std::vector<float> values;
      for (int l = 0; l < leaves; ++l) {
        const float* from = &parts[second * len + l * per_leaf * dim + j];
        float sum = from[0];
        for (int p = 1; p < per_leaf; ++p) sum += from[p * dim];
        values.push_back(sum);
      }
      float root = root_of(radices, values.data());
      for (int l = 0; l < merge[second]; ++l) root = held[l * dim + j] + root;
      expected[store[second] * dim + j] = root;
    }
    check_same("fold of " + std::to_string(leaves) + " x " + std::to_string(per_leaf) + " x " + std::to_string(dim) +
                   (second ? " second" : " first"), (second ? b : a).read(), expected);
  }
}

template <class T> void all(uint64_t seed) {
  column_sums<T>(2, 5, 72, 3, seed);
  column_sums<T>(1, 70, 33, 64, seed);
  column_sums<T>(3, 130, 64, 128, seed);
  column_sums<T>(1, 200, 40, 200, seed);
  head_sums<T>(1, 3, 4, 2, 16, 2, seed);
  head_sums<T>(2, 5, 3, 1, 20, 2, seed);
  head_sums<T>(1, 20, 10, 2, 128, 16, seed);
  sink_sums<T>(2, 5, 3, 20, 3, seed);
  sink_sums<T>(1, 100, 2, 264, 64, seed);
  if (ON_DEVICE) {
    sink_sums<T>(2, 1000, 16, 128, 64, seed);
    column_sums<T>(4, 500, 768, 128, seed);
    column_sums<T>(8, 1024, 768, 64, seed);
    head_sums<T>(2, 500, 16, 8, 128, 16, seed);
  }
}

int main() {
  for_seeds(3, [](uint64_t seed) {
    all<uint16_t>(seed);
    all<float>(seed);
    for (std::vector<int> radices : {std::vector<int>{}, {2}, {3, 2}, {2, 2, 2, 2}, {8}, {8, 8}, {2, 2, 3, 5}}) {
      for (int per_leaf : {1, 3, 16, 37}) folds(radices, per_leaf, per_leaf % 2 ? 70 : 32, int(per_leaf != 3), seed + per_leaf);
    }
  });
  return finish();
}
