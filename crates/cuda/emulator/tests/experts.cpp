// Mixtures of experts: the router and its gradient, places of copies, and sums over them, against double precision.
#include <algorithm>
#include <numeric>

#include "../../kernels/experts.cu"
#include "rows.h"

struct Routed {
  std::vector<double> scores, gates;
  std::vector<uint32_t> index, counts;
};

static std::vector<double> scores_of(const double* logits, int experts, bool sigmoid, double* lse = nullptr) {
  std::vector<double> s(logits, logits + experts);
  double most = *std::max_element(s.begin(), s.end()), sum = 0;
  for (auto& x : s) x = sigmoid ? 1 / (1 + std::exp(-x)) : std::exp(x - most), sum += x;
  if (!sigmoid) for (auto& x : s) x /= sum;
  if (lse) *lse = most + std::log(sum);
  return s;
}

// The experts of a row, best first; the first of those that are equally good.
static std::vector<int> chosen_of(std::vector<double> rank, const Router& r) {
  int experts = int(rank.size()), size = experts / r.groups;
  std::vector<double> good;
  for (int g = 0; g < r.groups; ++g) {
    std::vector<double> of(rank.begin() + g * size, rank.begin() + (g + 1) * size);
    std::sort(of.rbegin(), of.rend());
    good.push_back(of[0] + (size > 1 ? of[1] : 0));
  }
  for (int e = 0; e < experts; ++e) {
    int better = 0;
    for (int o = 0; o < r.groups; ++o) better += good[o] > good[e / size] || (good[o] == good[e / size] && o < e / size);
    if (better >= r.top_groups) rank[e] = -INFINITY;
  }
  std::vector<int> order(experts);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return rank[a] > rank[b]; });
  order.resize(r.top_k);
  return order;
}

static Routed reference(const Numbers64& logits, const std::vector<float>& bias, int n, int experts, int leaves, const Router& r) {
  Routed out;
  out.index.resize(2 * n * r.top_k);
  out.counts.resize(experts * leaves);
  for (int row = 0; row < n; ++row) {
    auto s = scores_of(&logits[row * experts], experts, r.sigmoid);
    auto rank = s;
    for (int e = 0; e < experts && !bias.empty(); ++e) rank[e] += bias[e];
    auto chosen = chosen_of(rank, r);
    double sum = 0;
    for (int e : chosen) sum += s[e];
    for (int j = 0; j < r.top_k; ++j) {
      out.gates.push_back(s[chosen[j]] / (r.renormalise ? sum : 1) * r.scale);
      out.index[(2 * row + 1) * r.top_k + j] = uint32_t(chosen[j]);
      ++out.counts[chosen[j] * leaves + row / (n / leaves)];
    }
    out.scores.insert(out.scores.end(), s.begin(), s.end());
  }
  uint32_t next = 0;
  for (int e = 0; e < experts; ++e) {
    for (int row = 0; row < n; ++row) {
      for (int j = 0; j < r.top_k; ++j) {
        if (out.index[(2 * row + 1) * r.top_k + j] == uint32_t(e)) out.index[2 * row * r.top_k + j] = next++;
      }
    }
  }
  return out;
}

// What route_dx is the gradient of: gates times their gradients, and the losses of the router's own, choices held.
static double objective(const Numbers64& logits, const Routed& routed, const std::vector<float>& dgates, int n, int experts, int leaves, const Router& r) {
  double total = 0;
  std::vector<double> mean(experts * leaves);
  int k = r.top_k, leaf_rows = n / leaves;
  for (int row = 0; row < n; ++row) {
    double lse = 0;
    auto s = scores_of(&logits[row * experts], experts, r.sigmoid);
    scores_of(&logits[row * experts], experts, false, &lse);
    double sum = 0, all = 0;
    for (int j = 0; j < k; ++j) sum += s[routed.index[(2 * row + 1) * k + j]];
    for (double x : s) all += x;
    for (int j = 0; j < k; ++j) total += dgates[row * k + j] * s[routed.index[(2 * row + 1) * k + j]] / (r.renormalise ? sum : 1) * r.scale;
    for (int e = 0; e < experts; ++e) mean[e * leaves + row / leaf_rows] += s[e] / (r.sigmoid ? all : 1) / leaf_rows;
    total += r.z * lse * lse;
  }
  for (int i = 0; i < experts * leaves; ++i) total += r.balance * routed.counts[i] * experts / double(k * leaf_rows) * mean[i];
  return total;
}

template <class T> void routes(int n, int experts, int leaves, Router r, bool biased, bool apart, uint64_t seed) {
  Random random(seed);
  auto logits = random_values<T>(random, size_t(n) * experts, 3);
  // Some are equally good, and whole rows are.
  for (int i = 0; i + 7 < n * experts; i += 5) logits[i + 3] = logits[i];
  for (int e = 0; e < experts; ++e) logits[e] = logits[0];
  std::vector<float> bias;
  if (biased) bias = random_values<float>(random, experts, 0.25);
  auto wide = numbers_of(logits);
  auto expected = reference(wide, bias, n, experts, leaves, r);
  Buffer<T> dlogits(logits), out(n * experts);
  Buffer<float> dbias(biased ? bias : std::vector<float>(1)), gates(n * r.top_k);
  Buffer<uint32_t> index(2 * n * r.top_k), counts(experts * leaves);
  int blocks = (n + ROUTED - 1) / ROUTED, room = ROUTED * (2 * experts + r.groups);
  Buffer<float> scratch(size_t(blocks) * room);
  float* own = apart ? scratch.ptr() : nullptr;
  auto is = name<T>("route", n, experts, seed) + " of " + std::to_string(r.groups);
  auto kernel = OF(T, route);
  LAUNCH(kernel, dim3(blocks), dim3(128), apart ? 0 : room * 4, dlogits.ptr(), biased ? dbias.ptr() : nullptr, gates.ptr(), index.ptr(), n, experts, own, r);
  LAUNCH(route_counts, dim3(experts * leaves), dim3(256), 0, index.ptr(), counts.ptr(), r.top_k, leaves, n / leaves);
  LAUNCH(route_places, dim3(experts * leaves), dim3(256), 0, index.ptr(), counts.ptr(), r.top_k, leaves, n / leaves);
  check(is + " gates", gates.read(), expected.gates, 2e-6);
  check_same(is + " index", index.read(), expected.index);
  check_same(is + " counts", counts.read(), expected.counts);
  auto dgates = random_values<float>(random, size_t(n) * r.top_k);
  Numbers64 slope;
  for (size_t i = 0; i < wide.size(); ++i) {
    auto moved = wide;
    double e = 1e-5;
    moved[i] = wide[i] + e;
    double up = objective(moved, expected, dgates, n, experts, leaves, r);
    moved[i] = wide[i] - e;
    slope.push_back((up - objective(moved, expected, dgates, n, experts, leaves, r)) / (2 * e));
  }
  Buffer<float> ddgates(dgates);
  auto backward = OF(T, route_dx);
  LAUNCH(backward, dim3(blocks), dim3(128), apart ? 0 : room * 4, ddgates.ptr(), dlogits.ptr(), index.ptr(), counts.ptr(), out.ptr(), n, experts, leaves, own, r);
  check(is + " dx", out.read(), slope, sizeof(T) == 2 ? 4e-3 : 1e-5);
  Buffer<double> load(std::vector<double>(experts, 2.0));
  LAUNCH(route_load, dim3((experts + 255) / 256), dim3(256), 0, load.ptr(), counts.ptr(), experts, leaves);
  std::vector<double> loads(experts, 2.0);
  std::vector<int> starts = {0}, tiles = {0};
  for (int i = 0; i < experts * leaves; ++i) loads[i / leaves] += expected.counts[i];
  for (double x : loads) starts.push_back(starts.back() + int(x) - 2), tiles.push_back(tiles.back() + (int(x) - 2 + 7) / 8);
  check_same(is + " load", load.read(), loads);
  starts.insert(starts.end(), tiles.begin(), tiles.end());
  Buffer<int> where(2 * experts + 2);
  LAUNCH(group_starts, dim3(1), dim3(256), 0, counts.ptr(), where.ptr(), experts, leaves, 8);
  check_same(is + " starts", where.read(), starts);
}

template <class T> void copies(int n, int k, int dim, uint64_t seed) {
  Random random(seed);
  std::vector<uint32_t> index(2 * n * k), places(n * k);
  std::iota(places.begin(), places.end(), 0);
  for (size_t i = places.size(); i > 1; --i) std::swap(places[i - 1], places[random.below(int(i))]);
  for (int i = 0; i < n * k; ++i) index[i / k * 2 * k + i % k] = places[i];
  auto x = random_values<T>(random, size_t(n) * dim), held = random_values<T>(random, size_t(n) * dim);
  auto y = random_values<T>(random, size_t(n) * k * dim);
  auto gates = random_values<float>(random, size_t(n) * k);
  std::vector<T> copied(n * k * dim);
  std::vector<double> summed, weighted, dcopies(n * k * dim), dgates;
  // The sums of f32 in their order: it is part of what is promised.
  std::vector<float> in_order;
  for (int i = 0; i < n * dim; ++i) {
    double sum = 0, of_gates = number(held[i]);
    float ordered = 0;
    for (int j = 0; j < k; ++j) {
      size_t at = size_t(places[i / dim * k + j]) * dim + i % dim;
      copied[at] = x[i];
      sum += number(y[at]), ordered += float(number(y[at]));
      of_gates += gates[i / dim * k + j] * number(y[at]);
    }
    summed.push_back(sum), weighted.push_back(of_gates), in_order.push_back(ordered);
  }
  for (int i = 0; i < n * k; ++i) {
    double dot = 0;
    for (int j = 0; j < dim; ++j) {
      dcopies[size_t(places[i]) * dim + j] = gates[i] * number(x[i / k * dim + j]);
      dot += number(x[i / k * dim + j]) * number(y[size_t(places[i]) * dim + j]);
    }
    dgates.push_back(dot);
  }
  Buffer<T> dx(x), dy(y), dheld(held), to(n * k * dim), out(n * dim);
  Buffer<float> dgate(gates), got(n * k);
  Buffer<uint32_t> dindex(index);
  dim3 block(threads_of(dim));
  auto is = name<T>("copies", n * k, dim, seed);
  RUN(T, permute, dim3(n), block, dx.ptr(), dindex.ptr(), to.ptr(), k, dim);
  check_same(is, to.read(), copied);
  RUN(T, sum_copies, dim3(n), block, dy.ptr(), (float*)nullptr, dindex.ptr(), (T*)nullptr, out.ptr(), k, dim);
  check(is + " sum", out.read(), summed, tolerance<T>());
  if constexpr (sizeof(T) == 4) check_same(is + " sum in order", out.read(), in_order);
  RUN(T, sum_copies, dim3(n), block, dy.ptr(), dgate.ptr(), dindex.ptr(), dheld.ptr(), dheld.ptr(), k, dim);
  check(is + " weighted sum in place", dheld.read(), weighted, tolerance<T>());
  RUN(T, unpermute_dx, dim3(n * k), block, dx.ptr(), dy.ptr(), dgate.ptr(), dindex.ptr(), to.ptr(), got.ptr(), k, dim);
  check(is + " dcopies", to.read(), dcopies, tolerance<T>());
  check(is + " dgates", got.read(), dgates, 2e-6);
}

static void balances(uint64_t seed) {
  std::vector<double> counts = {3, 2, 2, 1, 0, 0, 0, 0, 1, 1, 1, 2};
  std::vector<float> bias(12, 0.5f), expected = {0.25f, 0.5f, 0.5f, 0.75f, 0.5f, 0.5f, 0.5f, 0.5f, 0.75f, 0.75f, 0.75f, 0.25f};
  Buffer<double> dcounts(counts);
  Buffer<float> dbias(bias);
  LAUNCH(balance_experts, dim3(3), dim3(256), 0, dcounts.ptr(), dbias.ptr(), 4, 0.25f);
  check_same("balance seed " + std::to_string(seed), dbias.read(), expected);
}

template <class T> void all(uint64_t seed) {
  routes<T>(6, 4, 2, {2, 0, 1, 1, 1, 1.0f, 0.0f, 0.0f}, false, false, seed);
  routes<T>(9, 40, 3, {3, 0, 0, 1, 1, 2.0f, 0.3f, 0.02f}, true, false, seed);
  routes<T>(8, 12, 1, {2, 1, 1, 4, 2, 1.5f, 0.2f, 0.1f}, true, true, seed);
  routes<T>(5, 3, 1, {3, 1, 0, 3, 3, 1.0f, 0.0f, 0.0f}, false, false, seed);
  copies<T>(5, 2, 24, seed);
  copies<T>(3, 3, 300, seed);
  copies<T>(4, 1, 7, seed);
}

// More rows than a block looks at between two barriers.
static void long_leaves(uint64_t seed) {
  Router r = {2, 0, 1, 1, 1, 1.0f, 0.0f, 0.0f};
  Random random(seed);
  int n = 1200, experts = 3;
  auto logits = random_values<float>(random, n * experts);
  auto expected = reference(numbers_of(logits), {}, n, experts, 2, r);
  Buffer<uint32_t> index(expected.index), counts(experts * 2);
  LAUNCH(route_counts, dim3(experts * 2), dim3(256), 0, index.ptr(), counts.ptr(), 2, 2, n / 2);
  check_same("counts of many rows", counts.read(), expected.counts);
  auto blank = expected.index;
  for (int i = 0; i < 2 * n * 2; ++i) if (i % 4 < 2) blank[i] = ~0u;
  index.write(blank);
  LAUNCH(route_places, dim3(experts * 2), dim3(256), 0, index.ptr(), counts.ptr(), 2, 2, n / 2);
  check_same("places of many rows", index.read(), expected.index);
}

int main() {
  for_seeds(3, [](uint64_t seed) {
    all<float>(seed);
    all<uint16_t>(seed);
    balances(seed);
    long_leaves(seed);
  });
  return finish();
}
