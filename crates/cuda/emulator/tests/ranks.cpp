// Sums over ranks: the bits of the tree, whatever the rank and however many there are.
#include "../../kernels/ranks.cu"
#include "../test.h"

static void sum_of(const uint16_t* own, int me, const uint16_t* parts, long long stride, uint16_t* to, long long len, Tree tree, int blocks) {
  LAUNCH(sum_ranks_bf16, dim3(blocks), dim3(256), 0, own, me, parts, stride, to, len, tree);
}
static void sum_of(const float* own, int me, const float* parts, long long stride, float* to, long long len, Tree tree, int blocks) {
  LAUNCH(sum_ranks_f32, dim3(blocks), dim3(256), 0, own, me, parts, stride, to, len, tree);
}
static void sum_of(const double* own, int me, const double* parts, long long stride, double* to, long long len, Tree tree, int blocks) {
  LAUNCH(sum_ranks_f64, dim3(blocks), dim3(256), 0, own, me, parts, stride, to, len, tree);
}

static float wide(uint16_t x) { return host_bf2f(x); }
static float wide(float x) { return x; }
static double wide(double x) { return x; }

// The tree's value by recursion: the last radix is the root's.
template <class V> V reference(const std::vector<int>& radices, size_t depth, const std::vector<V>& leaves, size_t first) {
  if (depth == 0) return leaves[first];
  size_t stride = 1;
  for (size_t d = 0; d + 1 < depth; ++d) stride *= size_t(radices[d]);
  V sum = reference(radices, depth - 1, leaves, first);
  for (int r = 1; r < radices[depth - 1]; ++r) sum = sum + reference(radices, depth - 1, leaves, first + size_t(r) * stride);
  return sum;
}

template <class T> void sums(const std::vector<int>& radices, int len, uint64_t seed, bool in_place) {
  using V = decltype(wide(T()));
  Tree tree{};
  int ranks = 1;
  for (int r : radices) tree.radices[tree.depth++] = r, ranks *= r;
  Random random(seed);
  std::vector<std::vector<T>> all;
  for (int r = 0; r < ranks; ++r) all.push_back(random_values<T>(random, size_t(len), 1 << random.below(8)));
  std::vector<T> expected;
  for (int i = 0; i < len; ++i) {
    std::vector<V> leaves;
    for (auto& of : all) leaves.push_back(wide(of[size_t(i)]));
    T sum;
    assign(sum, number(reference(radices, radices.size(), leaves, 0)));
    expected.push_back(sum);
  }
  for (int me : {0, ranks / 2, ranks - 1}) {
    int stride = len + int(seed % 3);
    std::vector<T> parts(size_t(stride) * size_t(ranks - 1));
    for (int r = 0; r < ranks; ++r) {
      if (r != me) std::copy(all[size_t(r)].begin(), all[size_t(r)].end(), parts.begin() + (r - (r > me)) * stride);
    }
    Buffer<T> own(all[size_t(me)]), others(parts), to(all[size_t(me)]);
    T* at = in_place ? own.ptr() : to.ptr();
    sum_of(own.ptr(), me, others.ptr(), stride, at, len, tree, 1 + int(seed % 2));
    std::string name = std::to_string(ranks) + " ranks, " + std::to_string(sizeof(T)) + " bytes, rank " + std::to_string(me);
    check_same(name, in_place ? own.read() : to.read(), expected);
  }
}

int main() {
  for_seeds(3, [](uint64_t seed) {
    for (std::vector<int> radices : {std::vector<int>{2}, {3}, {2, 2}, {3, 2}, {2, 2, 2}, {5, 3, 2}, {2, 2, 2, 2}, {3, 2, 2, 2, 2}}) {
      for (int len : {1, 33, 700}) {
        sums<uint16_t>(radices, len, seed, len == 33);
        sums<float>(radices, len, seed, len == 33);
        sums<double>(radices, len, seed, len == 33);
      }
    }
    Buffer<uint32_t> marks(std::vector<uint32_t>{0, 4, 4});
    auto marked = [&](uint32_t which, int over, std::vector<uint32_t> expected) {
      LAUNCH(mark, dim3(1), dim3(1), 0, marks.ptr(), which, over);
      check_same("mark", marks.read(), expected);
    };
    marked(7, 0, {7, 5, 4});
    marked(7, 1, {7, 5, 5});
  });
  return finish();
}
