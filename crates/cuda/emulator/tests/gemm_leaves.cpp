// Gradients of weights: all ways to sum the same leaves give the same bits.
#include "../../kernels/gemm_wgmma.cu"
#include "../../kernels/sums.cu"
#include "../test.h"
#include "gemm_reference.h"
#include "tensor_map.h"

struct Width {
  const char* name;
  int cols, bytes, first_held;
  void (*kernel)(const TensorMap, const TensorMap, float*, long long, float*, int, int, int, const Tree, int, long long,
                 int, int);
};
#define WIDTH(W) \
  Width { "gemm_tn_f32_128x" #W, W, GemmTile<W>::BYTES, GemmTile<W>::HOLDS ? 1 : 0, gemm_tn_f32_128x##W }
static const Width WIDTHS[] = {WIDTH(256), WIDTH(192), WIDTH(128)};
#undef WIDTH

struct Shape {
  int out, in, leaf_rows;
  size_t len() const { return size_t(out) * size_t(in); }
};
// Where a sum goes: levels `merge` below are added, level `store` is written.
struct Into {
  float* levels;
  int merge, store;
  long long subtree_stride = 0;
};

static Tree tree_of(const std::vector<int>& radices) {
  Tree tree = {};
  for (int r : radices) tree.radices[tree.depth++] = r;
  return tree;
}
// The radices from `from` on, up to `to`.
static Tree part_of(const Tree& tree, int from, int to) {
  return tree_of(std::vector<int>(tree.radices + from, tree.radices + to));
}

static int blocks_of(const Width& w, const Shape& s, int subtrees, int most) {
  int tiles = (s.out + 127) / 128 * ((s.in + w.cols - 1) / w.cols) * subtrees;
  return tiles < most ? tiles : most;
}
static size_t held_len(const Width& w, int blocks, const Tree& tree) {
  return tree.depth > w.first_held ? size_t(blocks) * size_t(tree.depth - w.first_held) * 128 * size_t(w.cols) : 0;
}

// What starts the sum of `subtrees` trees of leaves from dy and x on, with at most so many blocks.
static std::function<void()> leaves_job(const Width& w, const Shape& s, const bf16* dy, const bf16* x, const Tree& tree,
                                        int subtrees, int blocks, float* held, Into to) {
  int leaves = leaves_of(tree) * subtrees;
  auto map = [&](const bf16* at, int cols) {
    return tensor_map_3d(at, cols, s.leaf_rows, leaves, 64);
  };
  TensorMap left = map(dy, s.out), right = map(x, s.in);
  auto kernel = w.kernel;
  int bytes = w.bytes;
  return [=] {
    START(kernel, dim3(unsigned(blocks)), dim3(384), bytes, left, right, to.levels, (long long)s.len(), held, s.out, s.in,
          s.leaf_rows, tree, subtrees, to.subtree_stride, to.merge, to.store);
  };
}
// The same, now, with as much memory as it may touch. All of it is written, so that no two blocks share any.
static void sum_leaves(const Width& w, const Shape& s, const bf16* dy, const bf16* x, const Tree& tree, int subtrees,
                       int most, Into to) {
  int blocks = blocks_of(w, s, subtrees, most);
  Buffer<float> held(held_len(w, blocks, tree));
  leaves_job(w, s, dy, x, tree, subtrees, blocks, held.size() > 0 ? held.ptr() : nullptr, to)();
  finish_launch();
  bool all = true;
  for (float v : held.read()) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    all = all && bits != ~0u;
  }
  if (!all) report(std::string(w.name) + ", memory between leaves that nobody writes", false, double(held.size()));
}
static std::function<void()> fold_job(const float* roots, long long stride, size_t len, const Tree& above, Into to) {
  return [=] {
    START(fold_f32, dim3(unsigned((len + 1023) / 1024)), dim3(256), 0, roots, stride, 1, 0ll, (long long)len, to.levels,
          (long long)len, above, to.merge, to.store);
  };
}

// What a launch with one leaf does with it, in levels of the tree below the outer ones: a counter, lowest digit first.
static Into step_of(const Tree& tree, int leaf, float* levels, int merge, int store) {
  for (int level = 0; level < tree.depth; ++level) {
    int digit = leaf % tree.radices[level];
    leaf /= tree.radices[level];
    if (digit == 0) return {levels, level, level};
    if (digit + 1 < tree.radices[level]) return {levels, level + 1, level};
  }
  return {levels, tree.depth + merge, tree.depth + store};
}

#ifdef PHALANX_ON_DEVICE
__global__ void reference_on_device(const bf16* dy, const bf16* x, double* sums, int rows, int out, int in) {
  int o = int(blockIdx.y), i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= in) return;
  double sum = 0;
  for (size_t n = 0; n < size_t(rows); ++n) {
    sum += double(bf2f(dy[n * size_t(out) + size_t(o)])) * double(bf2f(x[n * size_t(in) + size_t(i)]));
  }
  sums[size_t(o) * size_t(in) + size_t(i)] = sum;
}
#endif

static std::vector<double> reference(const Shape& s, int leaves, const std::vector<bf16>& dy, const std::vector<bf16>& x,
                                     const bf16* dy_there, const bf16* x_there) {
#ifdef PHALANX_ON_DEVICE
  (void)dy, (void)x;
  Buffer<double> sums(s.len());
  LAUNCH(reference_on_device, dim3(unsigned(s.in + 127) / 128, unsigned(s.out)), dim3(128), 0, dy_there, x_there, sums,
         leaves * s.leaf_rows, s.out, s.in);
  return sums.read();
#else
  (void)dy_there, (void)x_there;
  return reference_leaves(dy, x, leaves, s.out, s.in, s.leaf_rows);
#endif
}

struct Case {
  Shape shape;
  std::vector<int> radices;
  int merge, store;
};
constexpr int LEVELS = 3;

// `most` blocks at once: 1 takes all tiles one after another through one ring.
static void test_case(const Case& c, int most, uint64_t seed) {
  const Shape& s = c.shape;
  Tree tree = tree_of(c.radices);
  int leaves = leaves_of(tree);
  size_t len = s.len();
  Random random(seed);
  auto dy = random_values<bf16>(random, size_t(leaves) * size_t(s.leaf_rows) * size_t(s.out));
  auto x = random_values<bf16>(random, size_t(leaves) * size_t(s.leaf_rows) * size_t(s.in));
  // All that is summed for the first element is -0, and should stay what the first leaf makes of it.
  for (size_t at = 0; at < dy.size(); at += size_t(s.out)) dy[at] = 0x8000;
  for (size_t at = 0; at < x.size(); at += size_t(s.in)) x[at] = host_f2bf(1.0f);
  // Levels that are not to be read are no numbers.
  std::vector<float> levels(LEVELS * len, std::nanf(""));
  auto given = random_values<float>(random, size_t(c.merge) * len, 3.0);
  std::copy(given.begin(), given.end(), levels.begin());
  Buffer<bf16> ddy(dy), dx(x);
  auto expected = reference(s, leaves, dy, x, ddy, dx);
  for (size_t i = 0; i < given.size(); ++i) expected[i % len] += given[i];

  std::string shape = "dw " + std::to_string(s.out) + " x " + std::to_string(s.in) + " of " + name_of(tree) + " x " +
                      std::to_string(s.leaf_rows) + " merge " + std::to_string(c.merge) + " store " +
                      std::to_string(c.store) + " seed " + std::to_string(seed);
  std::vector<float> first;  // all levels, which no way to come to them changes
  for (const auto& w : WIDTHS) {
    std::string name = shape + " tile " + std::to_string(w.cols);
    Buffer<float> to(levels);
    sum_leaves(w, s, ddy, dx, tree, 1, most, {to, c.merge, c.store});
    auto all = to.read();
    std::vector<float> result(all.begin() + c.store * long(len), all.begin() + (c.store + 1) * long(len));
    check(name, result, expected, 1e-5);
    if (first.empty()) {
      first = levels;
      std::copy(result.begin(), result.end(), first.begin() + c.store * long(len));
    }
    check_same(name + ", all levels", all, first);

    // Other blocks take other tiles.
    Buffer<float> again(levels);
    sum_leaves(w, s, ddy, dx, tree, 1, most + 2, {again, c.merge, c.store});
    check_same(name + ", more blocks", again.read(), first);

    // The tree cut at each height: subtrees beside each other with room between them, and then their roots.
    for (int cut = 0; cut < tree.depth; ++cut) {
      Tree below = part_of(tree, 0, cut), above = part_of(tree, cut, tree.depth);
      int units = leaves_of(above);
      size_t stride = len + 8 * size_t(random.below(3));
      Buffer<float> roots(size_t(units) * stride), folded(levels);
      sum_leaves(w, s, ddy, dx, below, units, most, {roots, 0, 0, (long long)stride});
      fold_job(roots, (long long)stride, len, above, {folded, c.merge, c.store})();
      finish_launch();
      check_same(name + ", " + std::to_string(units) + " units", folded.read(), first);
      auto written = roots.read();
      std::vector<uint32_t> between, untouched;
      for (size_t i = 0; i < written.size(); ++i) {
        if (i % stride < len) continue;
        uint32_t bits;
        std::memcpy(&bits, &written[i], 4);
        between.push_back(bits), untouched.push_back(~0u);
      }
      if (stride > len) check_same(name + ", between units", between, untouched);
    }

    // A launch for each leaf, through levels of the tree that lie below the outer ones.
    size_t own = size_t(tree.depth) * len;
    std::vector<float> stacked(own, std::nanf(""));
    stacked.insert(stacked.end(), levels.begin(), levels.end());
    Buffer<float> counter(stacked);
    for (int leaf = 0; leaf < leaves; ++leaf) {
      size_t row = size_t(leaf) * size_t(s.leaf_rows);
      sum_leaves(w, s, ddy + row * size_t(s.out), dx + row * size_t(s.in), Tree{}, 1, most,
                 step_of(tree, leaf, counter, c.merge, c.store));
    }
    auto counted = counter.read();
    check_same(name + ", leaf by leaf", std::vector<float>(counted.begin() + long(own), counted.end()), first);
  }
}

#ifdef PHALANX_ON_DEVICE
#include "gemm_leaves_bench.h"
#endif

int main(int argc, char** argv) {
#ifdef PHALANX_ON_DEVICE
  if (argc > 1 && std::string(argv[1]) == "--bench") return bench_leaves();
  test_case({{3072, 768, 1024}, {2, 2, 2}, 1, 1}, 132, 1);
  test_case({{768, 3072, 1024}, {2, 2, 2}, 2, 2}, 132, 2);
  test_case({{2560, 2048, 1000}, {3}, 0, 0}, 132, 3);
  test_case({{1032, 776, 333}, {2, 2, 2, 2}, 1, 0}, 130, 4);
#else
  (void)argc, (void)argv;
#endif
  const Case cases[] = {
      {{8, 8, 1}, {}, 0, 0},          {{72, 8, 16}, {2}, 1, 0},
      {{8, 264, 64}, {3}, 1, 1},      {{128, 128, 200}, {2, 2}, 2, 2},
      {{200, 72, 100}, {3, 2}, 0, 0}, {{264, 264, 64}, {2, 2}, 1, 1},
      {{264, 200, 1}, {2}, 2, 2},     {{72, 200, 16}, {2, 2, 2}, 1, 0},
      {{200, 264, 200}, {}, 2, 2},    {{128, 8, 100}, {2, 2, 2}, 2, 2},
      {{8, 72, 1}, {2, 2, 2, 2}, 1, 1}, {{72, 128, 64}, {2, 2, 2, 2}, 0, 0},
      {{128, 264, 16}, {3, 2}, 2, 2}, {{264, 8, 200}, {3}, 0, 0},
  };
  // Schedules, and blocks at once, are drawn anew for each.
  for_seeds(2, [&](uint64_t seed) {
    for (const auto& c : cases) test_case(c, 1 + int(seed % 3), seed);
  });
  // Small ones, whose rings turn many times, under more.
  for_seeds(8, [&](uint64_t seed) {
    test_case({{8, 8, 200}, {2, 2}, 1, 1}, 1, seed + 100);
    test_case({{72, 8, 64}, {3, 2}, 0, 0}, 1, seed + 100);
  });
  return finish();
}
