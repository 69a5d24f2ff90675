// Products of rows with the matrices of their experts, some of whom have no rows.
#include "../../kernels/grouped.cu"
#include "../../kernels/experts.cu"
#include "rows.h"

static std::vector<uint32_t> counts_of(int experts, int leaves, int most, Random& r) {
  std::vector<uint32_t> counts;
  for (int i = 0; i < experts * leaves; ++i) counts.push_back(i / leaves % 3 == 1 ? 0 : uint32_t(r.below(most + 1)));
  return counts;
}

struct Shared {
  std::vector<uint32_t> counts;
  Buffer<uint32_t> dcounts;
  Buffer<int> starts;
  int experts, leaves, rows = 0;
  Shared(std::vector<uint32_t> from, int experts, int leaves)
      : counts(from), dcounts(from), starts(2 * experts + 2), experts(experts), leaves(leaves) {
    for (auto c : counts) rows += int(c);
    LAUNCH(group_starts, dim3(1), dim3(256), 0, dcounts.ptr(), starts.ptr(), experts, leaves, SIDE);
  }
  // The expert of a row, and its leaf.
  std::vector<std::pair<int, int>> owners() const {
    std::vector<std::pair<int, int>> all;
    for (int i = 0; i < experts * leaves; ++i) all.insert(all.end(), counts[i], {i / leaves, i % leaves});
    return all;
  }
};

template <class T> void forward(Shared& s, int cols, int inner, bool biased, uint64_t seed) {
  Random r(seed);
  auto x = random_values<T>(r, size_t(s.rows) * inner), w = random_values<T>(r, size_t(s.experts) * cols * inner);
  auto b = random_values<T>(r, size_t(s.experts) * cols);
  auto owners = s.owners();
  for (bool transposed : {true, false}) {
    Numbers64 expected;
    for (int row = 0; row < s.rows; ++row) {
      size_t e = size_t(owners[row].first);
      for (int c = 0; c < cols; ++c) {
        double sum = transposed && biased ? number(b[e * cols + c]) : 0;
        for (int k = 0; k < inner; ++k) {
          sum += number(x[size_t(row) * inner + k]) * number(w[e * cols * inner + (transposed ? size_t(c) * inner + k : size_t(k) * cols + c)]);
        }
        expected.push_back(sum);
      }
    }
    Buffer<T> dx(x), dw(w), db(b), y(size_t(s.rows) * cols), again(size_t(s.rows) * cols);
    auto start = [&](int blocks, T* to) {
      if (transposed) {
        RUN(T, grouped_nt, dim3(blocks), dim3(256), dx.ptr(), dw.ptr(), biased ? db.ptr() : nullptr, to, s.starts.ptr(), s.experts, cols, inner);
      } else {
        RUN(T, grouped_nn, dim3(blocks), dim3(256), dx.ptr(), dw.ptr(), to, s.starts.ptr(), s.experts, cols, inner);
      }
    };
    start(2, y.ptr());
    start(5, again.ptr());
    auto is = name<T>(transposed ? "grouped nt" : "grouped nn", s.rows, cols, seed) + " x " + std::to_string(inner);
    check(is, y.read(), expected, tolerance<T>());
    check_same(is + " by other blocks", again.read(), y.read());
  }
}

template <class T> void backward(Shared& s, int rows, int cols, const Tree& tree, int merge, int store, uint64_t seed) {
  Random r(seed);
  size_t len = size_t(s.experts) * rows * cols, bias_len = size_t(s.experts) * rows;
  auto dy = random_values<T>(r, size_t(s.rows) * rows), x = random_values<T>(r, size_t(s.rows) * cols);
  auto levels = random_values<float>(r, 3 * len), bias = random_values<float>(r, 3 * bias_len);
  Numbers64 expected(len), sums(bias_len);
  auto owners = s.owners();
  for (int n = 0; n < s.rows; ++n) {
    for (int o = 0; o < rows; ++o) {
      size_t at = size_t(owners[n].first) * rows + o;
      sums[at] += number(dy[size_t(n) * rows + o]);
      for (int i = 0; i < cols; ++i) expected[at * cols + i] += number(dy[size_t(n) * rows + o]) * number(x[size_t(n) * cols + i]);
    }
  }
  for (int l = 0; l < merge; ++l) {
    for (size_t i = 0; i < len; ++i) expected[i] += levels[l * len + i];
    for (size_t i = 0; i < bias_len; ++i) sums[i] += bias[l * bias_len + i];
  }
  Buffer<T> ddy(dy), dx(x);
  Buffer<float> to(levels), again(levels), of_bias(bias), held(size_t(4) * tree.depth * SIDE * SIDE);
  auto start = [&](int blocks, float* levels) {
    RUN(T, grouped_tn, dim3(blocks), dim3(256), ddy.ptr(), dx.ptr(), s.dcounts.ptr(), s.starts.ptr(), levels, (long long)len, held.ptr(), s.experts, s.leaves, rows, cols, tree, merge, store);
  };
  start(4, to.ptr());
  start(1, again.ptr());
  auto is = name<T>("grouped tn", rows, cols, seed) + " merge " + std::to_string(merge);
  auto all = to.read(), before = levels;
  std::vector<float> result(all.begin() + long(store * len), all.begin() + long((store + 1) * len));
  check(is, result, expected, 3e-6);
  std::copy(result.begin(), result.end(), before.begin() + long(store * len));
  check_same(is + ", other levels", all, before);
  check_same(is + " by other blocks", again.read(), all);
  RUN(T, grouped_bias, dim3((rows + 255) / 256, s.experts), dim3(256), ddy.ptr(), s.dcounts.ptr(), s.starts.ptr(), of_bias.ptr(), (long long)bias_len, s.experts, s.leaves, rows, tree, merge, store);
  auto biases = of_bias.read();
  check(is + " bias", std::vector<float>(biases.begin() + long(store * bias_len), biases.begin() + long((store + 1) * bias_len)), sums, 3e-6);
}

template <class T> void all(uint64_t seed) {
  Random r(seed);
  Shared few(counts_of(4, 2, 5, r), 4, 2), many({140, 0, 3, 129}, 4, 1), leaves(counts_of(3, 6, 20, r), 3, 6);
  forward<T>(few, 24, 40, true, seed);
  forward<T>(many, 136, 8, false, seed);
  forward<T>(leaves, 7, 13, true, seed);
  backward<T>(few, 24, 16, Tree{1, {2}}, 1, 0, seed);
  backward<T>(many, 8, 136, Tree{}, 0, 0, seed);
  backward<T>(leaves, 9, 5, Tree{2, {3, 2}}, 2, 2, seed);
}

int main() {
  for_seeds(2, [](uint64_t seed) {
    all<float>(seed);
    all<uint16_t>(seed);
  });
  return finish();
}
