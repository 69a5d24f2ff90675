// Products of rows with the matrices of their experts, some of whom have no rows.
#include "../../kernels/grouped.cu"
#include "../../kernels/experts.cu"
#include "rows.h"

static std::vector<uint32_t> counts_of(int units, int leaves, int most, Random& r) {
  std::vector<uint32_t> counts;
  for (int i = 0; i < units * leaves; ++i) counts.push_back(i / leaves % 3 == 1 ? 0 : uint32_t(r.below(most + 1)));
  return counts;
}

struct Shared {
  std::vector<uint32_t> counts;
  Buffer<uint32_t> dcounts;
  Buffer<int> starts;
  int units, experts, leaves, rows = 0;
  Shared(std::vector<uint32_t> from, int experts, int leaves)
      : counts(from), dcounts(from), starts(2 * from.size() / leaves + 2), units(int(from.size()) / leaves),
        experts(experts), leaves(leaves) {
    for (auto c : counts) rows += int(c);
    LAUNCH(group_starts, dim3(1), dim3(256), 0, dcounts.ptr(), starts.ptr(), units, leaves, SIDE);
  }
  // The expert of a row, and the rank that it is from.
  std::vector<std::pair<int, int>> owners() const {
    std::vector<std::pair<int, int>> all;
    for (int i = 0; i < units * leaves; ++i) {
      int unit = i / leaves;
      all.insert(all.end(), counts[i], {unit % experts, unit / experts});
    }
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
        RUN(T, grouped_nt, dim3(blocks), dim3(256), dx.ptr(), dw.ptr(), biased ? db.ptr() : nullptr, to, s.starts.ptr(), s.units, s.experts, cols, inner);
      } else {
        RUN(T, grouped_nn, dim3(blocks), dim3(256), dx.ptr(), dw.ptr(), to, s.starts.ptr(), s.units, s.experts, cols, inner);
      }
    };
    start(2, y.ptr());
    start(5, again.ptr());
    auto is = name<T>(transposed ? "grouped nt" : "grouped nn", s.rows, cols, seed) + " x " + std::to_string(inner);
    check(is, y.read(), expected, tolerance<T>());
    check_same(is + " by other blocks", again.read(), y.read());
  }
}

// Each rank's rows have `apart` levels of their own, or all join one sum.
template <class T> void backward(Shared& s, int rows, int cols, const Tree& tree, int merge, int store, int apart, uint64_t seed) {
  Random r(seed);
  size_t len = size_t(s.experts) * rows * cols, bias_len = size_t(s.experts) * rows;
  int peers = s.units / s.experts, streams = apart > 0 ? peers : 1, count = apart > 0 ? peers * apart : 3;
  auto dy = random_values<T>(r, size_t(s.rows) * rows), x = random_values<T>(r, size_t(s.rows) * cols);
  auto levels = random_values<float>(r, count * len), bias = random_values<float>(r, count * bias_len);
  Numbers64 expected(streams * len), sums(streams * bias_len);
  auto owners = s.owners();
  for (int n = 0; n < s.rows; ++n) {
    size_t stream = size_t(apart > 0 ? owners[n].second : 0);
    for (int o = 0; o < rows; ++o) {
      size_t at = stream * bias_len + size_t(owners[n].first) * rows + o;
      sums[at] += number(dy[size_t(n) * rows + o]);
      for (int i = 0; i < cols; ++i) expected[at * cols + i] += number(dy[size_t(n) * rows + o]) * number(x[size_t(n) * cols + i]);
    }
  }
  auto meet = [&](Numbers64& sums, const std::vector<float>& levels, size_t len) {
    for (int t = 0; t < streams; ++t) {
      for (int l = 0; l < merge; ++l) {
        for (size_t i = 0; i < len; ++i) sums[t * len + i] += levels[(t * apart + l) * len + i];
      }
    }
  };
  meet(expected, levels, len), meet(sums, bias, bias_len);
  Buffer<T> ddy(dy), dx(x);
  Buffer<float> to(levels), again(levels), of_bias(bias), held(size_t(4) * tree.depth * SIDE * SIDE);
  auto start = [&](int blocks, float* levels) {
    RUN(T, grouped_tn, dim3(blocks), dim3(256), ddy.ptr(), dx.ptr(), s.dcounts.ptr(), s.starts.ptr(), levels, (long long)len, held.ptr(), s.units, s.experts, s.leaves, rows, cols, tree, merge, store, apart);
  };
  start(4, to.ptr());
  start(1, again.ptr());
  auto is = name<T>("grouped tn", rows, cols, seed) + " merge " + std::to_string(merge) + " apart " + std::to_string(apart);
  // The results, where they were left, and whether all else is as it was.
  auto left = [&](const std::vector<float>& after, std::vector<float> before, size_t len, const std::string& what) {
    std::vector<float> result;
    for (int t = 0; t < streams; ++t) {
      auto at = long((t * apart + store) * len);
      result.insert(result.end(), after.begin() + at, after.begin() + at + long(len));
      std::copy(after.begin() + at, after.begin() + at + long(len), before.begin() + at);
    }
    check_same(what + ", other levels", after, before);
    return result;
  };
  auto all = to.read();
  check(is, left(all, levels, len, is), expected, 3e-6);
  check_same(is + " by other blocks", again.read(), all);
  RUN(T, grouped_bias, dim3((rows + 255) / 256, s.experts), dim3(256), ddy.ptr(), s.dcounts.ptr(), s.starts.ptr(), of_bias.ptr(), (long long)bias_len, s.units, s.experts, s.leaves, rows, tree, merge, store, apart);
  check(is + " bias", left(of_bias.read(), bias, bias_len, is + " bias"), sums, 3e-6);
}

template <class T> void all(uint64_t seed) {
  Random r(seed);
  Shared few(counts_of(4, 2, 5, r), 4, 2), many({140, 0, 3, 129}, 4, 1), leaves(counts_of(3, 6, 20, r), 3, 6);
  Shared ranks(counts_of(8, 2, 9, r), 4, 2), far({3, 0, 140, 5, 131, 2}, 2, 1);
  forward<T>(few, 24, 40, true, seed);
  forward<T>(many, 136, 8, false, seed);
  forward<T>(leaves, 7, 13, true, seed);
  backward<T>(few, 24, 16, Tree{1, {2}}, 1, 0, 0, seed);
  backward<T>(many, 8, 136, Tree{}, 0, 0, 0, seed);
  backward<T>(leaves, 9, 5, Tree{2, {3, 2}}, 2, 2, 0, seed);
  forward<T>(ranks, 24, 16, true, seed);
  forward<T>(far, 20, 40, true, seed);
  backward<T>(ranks, 8, 12, Tree{1, {2}}, 1, 1, 0, seed);
  backward<T>(ranks, 8, 12, Tree{1, {2}}, 1, 1, 2, seed);
  backward<T>(far, 9, 24, Tree{}, 0, 0, 1, seed);
}

int main() {
  for_seeds(2, [](uint64_t seed) {
    all<float>(seed);
    all<uint16_t>(seed);
  });
  return finish();
}
