// Folds of leaves and gradients of embeddings: values, and the bits that the contract promises, however leaves are split
// over launches.
#include "../../kernels/sums.cu"
#include "../test.h"

static void fold_of(const uint16_t* parts, long long stride, int count, long long part_stride, long long len, float* levels,
                    long long level_len, Tree tree, int merge, int store, int blocks) {
  LAUNCH(fold_bf16, dim3(blocks), dim3(256), 0, parts, stride, count, part_stride, len, levels, level_len, tree, merge, store);
}
static void fold_of(const float* parts, long long stride, int count, long long part_stride, long long len, float* levels,
                    long long level_len, Tree tree, int merge, int store, int blocks) {
  LAUNCH(fold_f32, dim3(blocks), dim3(256), 0, parts, stride, count, part_stride, len, levels, level_len, tree, merge, store);
}

static Tree tree_of(const std::vector<int>& radices) {
  Tree tree{};
  for (int r : radices) tree.radices[tree.depth++] = r;
  return tree;
}
static int leaves_of(const std::vector<int>& radices) {
  int leaves = 1;
  for (int r : radices) leaves *= r;
  return leaves;
}
static std::string text(const std::vector<int>& radices) {
  std::string s = "[";
  for (int r : radices) s += std::to_string(r) + " ";
  return s + "]";
}

// The tree's value of f32 leaves, by recursion: the last radix is the root's.
static float reference(const std::vector<int>& radices, size_t depth, const std::vector<float>& leaves, int first) {
  if (depth == 0) return leaves[first];
  int stride = leaves_of(std::vector<int>(radices.begin(), radices.begin() + depth - 1));
  float sum = reference(radices, depth - 1, leaves, first);
  for (int r = 1; r < radices[depth - 1]; ++r) sum = sum + reference(radices, depth - 1, leaves, first + r * stride);
  return sum;
}

// What step `leaf` of a mixed-radix counter merges and stores; the root of a tree of depth d is stored at d.
static std::pair<int, int> step(const std::vector<int>& radices, int leaf) {
  int level = 0;
  for (int radix : radices) {
    int digit = leaf % radix;
    leaf /= radix;
    if (digit == 0) return {level, level};
    if (digit + 1 < radix) return {level + 1, level};
    ++level;
  }
  return {level, level};
}

template <class T> void folds(std::vector<int> radices, int parts, int len, int level_len, uint64_t seed) {
  Random r(seed);
  int leaves = leaves_of(radices);
  auto x = random_values<T>(r, leaves * parts * len);
  auto held = random_values<float>(r, 3 * level_len);
  for (int merge = 0; merge <= 2; ++merge) {
    int store = merge == 0 ? 1 : merge == 1 ? 0 : 2;
    std::vector<float> expected = held;
    for (int i = 0; i < level_len; ++i) {
      std::vector<float> values;
      for (int l = 0; l < leaves; ++l) {
        float sum = 0;
        for (int p = 0; i < len && p < parts; ++p) {
          float v = float(number(x[(l * parts + p) * len + i]));
          sum = p == 0 ? v : sum + v;
        }
        values.push_back(sum);
      }
      float root = reference(radices, radices.size(), values, 0);
      for (int l = 0; l < merge; ++l) root = held[l * level_len + i] + root;
      expected[store * level_len + i] = root;
    }
    Buffer<T> dx(x);
    Buffer<float> levels(held);
    fold_of(dx.ptr(), parts * len, parts, len, len, levels, level_len, tree_of(radices), merge, store, 1 + int(seed % 2));
    check_same("fold " + text(radices) + (sizeof(T) == 2 ? "bf16 " : "f32 ") + std::to_string(parts) + " parts of " +
                   std::to_string(len) + ", merge " + std::to_string(merge), levels.read(), expected);
  }
}

// Leaves folded in one launch, or one or a subtree at a time through levels, are the same.
static void split_folds(std::vector<int> inner, std::vector<int> outer, int len, uint64_t seed) {
  Random r(seed);
  int below = leaves_of(inner), above = leaves_of(outer), depth = int(outer.size());
  auto x = random_values<float>(r, below * above * len);
  Buffer<float> dx(x), whole(len), levels((depth + 1) * len);
  std::vector<int> all = inner;
  all.insert(all.end(), outer.begin(), outer.end());
  fold_of(dx.ptr(), len, 1, 0, len, whole, len, tree_of(all), 0, 0, 1);
  for (int i = 0; i < above; ++i) {
    auto [merge, store] = step(outer, i);
    fold_of(dx.ptr() + i * below * len, len, 1, 0, len, levels, len, tree_of(inner), merge, store, 1);
  }
  auto held = levels.read();
  check_same("split fold " + text(inner) + text(outer), std::vector<float>(held.end() - len, held.end()), whole.read());
}

static void embed_rows_of(const uint32_t* ids, const uint16_t* dy, float* rows, int* map, int v0, int vr, int n, int lr, int dim,
                          Tree tree, int block) {
  LAUNCH(embed_rows_bf16, dim3(n), dim3(block), 0, ids, dy, rows, map, v0, vr, lr, dim, tree);
}
static void embed_rows_of(const uint32_t* ids, const float* dy, float* rows, int* map, int v0, int vr, int n, int lr, int dim,
                          Tree tree, int block) {
  LAUNCH(embed_rows_f32, dim3(n), dim3(block), 0, ids, dy, rows, map, v0, vr, lr, dim, tree);
}

// The gradient of the table as kernels give it, into `levels`.
template <class T>
void embed_grad(const std::vector<uint32_t>& ids, const std::vector<T>& dy, Buffer<float>& levels, int vocab0, int vocab_rows,
                int dim, const std::vector<int>& radices, int merge, int store) {
  int n = int(ids.size()), block = std::min(std::max((dim + 7) / 8 + 31, 32) / 32 * 32, 256);
  Buffer<uint32_t> dids(ids);
  Buffer<T> ddy(dy);
  Buffer<float> rows(n * dim);
  Buffer<int> map(vocab_rows);
  map.fill(0xff);
  dim3 by_token((n + 255) / 256);
  LAUNCH(embed_first, by_token, dim3(256), 0, dids.ptr(), rows.ptr(), map.ptr(), vocab0, vocab_rows, n, dim);
  LAUNCH(embed_list, by_token, dim3(256), 0, dids.ptr(), rows.ptr(), map.ptr(), vocab0, vocab_rows, n, dim);
  embed_rows_of(dids.ptr(), ddy.ptr(), rows.ptr(), map.ptr(), vocab0, vocab_rows, n, n / leaves_of(radices), dim,
                tree_of(radices), block);
  LAUNCH(embed_fold, dim3(vocab_rows), dim3(block), 0, rows.ptr(), map.ptr(), levels.ptr(), vocab_rows, dim, merge, store);
}

template <class T> void embeds(std::vector<int> radices, int leaf_rows, int ids_below, int dim, uint64_t seed) {
  Random r(seed);
  int vocab0 = 3, vocab_rows = 6, leaves = leaves_of(radices), n = leaves * leaf_rows;
  std::vector<uint32_t> ids(n);
  for (auto& id : ids) id = uint32_t(r.below(ids_below));
  auto dy = random_values<T>(r, n * dim);
  int len = vocab_rows * dim;
  std::vector<float> expected(len), held = random_values<float>(r, 2 * len);
  for (int row = 0; row < vocab_rows; ++row) {
    for (int j = 0; j < dim; ++j) {
      std::vector<float> values(leaves, 0.0f);
      for (int t = 0; t < n; ++t) {
        if (int(ids[t]) == row + vocab0) values[t / leaf_rows] += float(number(dy[t * dim + j]));
      }
      expected[row * dim + j] = held[row * dim + j] + reference(radices, radices.size(), values, 0);
    }
  }
  Buffer<float> levels(held);
  embed_grad(ids, dy, levels, vocab0, vocab_rows, dim, radices, 1, 1);
  auto got = levels.read();
  std::string is = "embed grad " + text(radices) + (sizeof(T) == 2 ? "bf16 " : "f32 ") + std::to_string(n) + " x " + std::to_string(dim);
  check_same(is, std::vector<float>(got.begin() + len, got.end()), expected);
  // By leaf, through levels.
  Buffer<float> whole(len), split((radices.size() + 1) * len);
  embed_grad(ids, dy, whole, vocab0, vocab_rows, dim, radices, 0, 0);
  for (int l = 0; l < leaves; ++l) {
    auto [merge, store] = step(radices, l);
    embed_grad(std::vector<uint32_t>(ids.begin() + l * leaf_rows, ids.begin() + (l + 1) * leaf_rows),
               std::vector<T>(dy.begin() + l * leaf_rows * dim, dy.begin() + (l + 1) * leaf_rows * dim), split, vocab0,
               vocab_rows, dim, {}, merge, store);
  }
  auto levels_of_split = split.read();
  check_same(is + " by leaf", std::vector<float>(levels_of_split.end() - len, levels_of_split.end()), whole.read());
}

// Positions of two pieces of a sequence, those of others in between.
template <class T> static void positions(std::vector<int> radices, int sequence, int dim, uint64_t seed) {
  Random r(seed);
  int leaves = leaves_of(radices), half = sequence / 2, front = half, back = 4 * half, all = 6 * half;
  auto dy = random_values<T>(r, leaves * sequence * dim);
  auto held = random_values<float>(r, 2 * all * dim);
  auto expected = held;
  for (int at = 0; at < all * dim; ++at) {
    int position = at / dim, row = position - front;
    if (row < 0 || row >= half) row = position >= back && position < back + half ? half + position - back : -1;
    std::vector<float> of;
    for (int leaf = 0; leaf < leaves; ++leaf) {
      of.push_back(row < 0 ? 0.0f : float(number(dy[(leaf * sequence + row) * dim + at % dim])));
    }
    expected[all * dim + at] = held[at] + reference(radices, radices.size(), of, 0);
  }
  Buffer<T> ddy(dy);
  Buffer<float> levels(held);
  Tree tree = tree_of(radices);
  if constexpr (sizeof(T) == 2) {
    LAUNCH(pos_dw_bf16, dim3(2), dim3(256), 0, ddy.ptr(), levels.ptr(), all, dim, sequence, front, back, tree, 1, 1);
  } else {
    LAUNCH(pos_dw_f32, dim3(2), dim3(256), 0, ddy.ptr(), levels.ptr(), all, dim, sequence, front, back, tree, 1, 1);
  }
  check_same("positions of pieces " + text(radices), levels.read(), expected);
}

int main() {
  for_seeds(3, [](uint64_t seed) {
    for (std::vector<int> radices : {std::vector<int>{}, {2}, {3}, {2, 2}, {3, 2}, {2, 3, 2}, {2, 2, 2, 2}, {2, 2, 3, 2, 2}}) {
      for (int parts : {1, 3, 11}) {
        folds<float>(radices, parts, 40, 40, seed);
        folds<uint16_t>(radices, parts, 33, 50, seed);
        folds<float>(radices, parts, 1100, 1200, seed);
      }
      positions<float>(radices, 6, 5, seed);
      positions<uint16_t>(radices, 4, 8, seed);
      split_folds({}, radices, 37, seed);
      split_folds({2, 3}, radices, 40, seed);
      embeds<float>(radices, 5, 12, 33, seed);
      embeds<uint16_t>(radices, 7, 5, 40, seed);
    }
    embeds<uint16_t>({2, 2}, 300, 40, 24, seed);
    embeds<float>({2}, 600, 9, 16, seed);
    embeds<uint16_t>({2}, 3, 8, 2100, seed);
    // Ids with fewer tokens than a list holds, and with more.
    embeds<float>({2, 2}, 240, 12, 136, seed);
    embeds<uint16_t>({3}, 150, 4, 136, seed);
    embeds<float>({2}, 9, 6, 1, seed);
    Random r(seed);
    for (int len : {1, 4, 33, 3000}) {
      auto x = random_values<float>(r, len), y = random_values<float>(r, len);
      Buffer<float> dx(x), dy(y);
      LAUNCH(accumulate_f32, dim3(2), dim3(256), 0, dx.ptr(), dy.ptr(), (long long)len);
      for (int i = 0; i < len; ++i) y[i] += x[i];
      check_same("accumulate", dy.read(), y);
    }
  });
  return finish();
}
