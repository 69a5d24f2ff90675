// Cross-entropy against its formula in double precision; shards give the bits of the whole where there is one.
#include "../../kernels/loss.cu"
#include "../test.h"

#define RUN(T, kernel, grid, block, ...)                                                      \
  do {                                                                                        \
    if constexpr (sizeof(T) == 2) { LAUNCH(kernel##_bf16, grid, block, 0, __VA_ARGS__); }     \
    else { LAUNCH(kernel##_f32, grid, block, 0, __VA_ARGS__); }                               \
  } while (0)

template <class T> void losses(int n, int vocab, int shards, int block, double scale, uint64_t seed, Terms terms = {1, 0, 0}) {
  Random r(seed);
  auto x = random_values<T>(r, n * vocab, scale);
  std::vector<uint32_t> targets(n);
  for (auto& t : targets) t = uint32_t(r.below(vocab));
  if (n > 1) targets[1] = 0xffffffffu;
  float by = 0.37f;
  double z = terms.z, cap = terms.per_cap;
  std::vector<double> loss(n), grad(n * vocab);
  for (int i = 0; i < n; ++i) {
    double most = -1e300, sum = 0;
    for (int j = 0; j < vocab; ++j) most = std::max(most, number(x[i * vocab + j]));
    for (int j = 0; j < vocab; ++j) sum += std::exp(number(x[i * vocab + j]) - most);
    if (targets[i] == 0xffffffffu) continue;
    loss[i] = std::log(sum) + most - number(x[i * vocab + targets[i]]);
    double more = 1 + 2 * z * (std::log(sum) + most);
    for (int j = 0; j < vocab; ++j) {
      double v = number(x[i * vocab + j]), p = std::exp(v - most) / sum * more;
      grad[i * vocab + j] = by * terms.scale * (p - (j == int(targets[i]))) * (1 - v * cap * v * cap);
    }
  }
  Buffer<Numbers> numbers(std::vector<Numbers>{Numbers{by}});
  Buffer<uint32_t> dt(targets);
  Buffer<T> io(x);
  Buffer<float> out(n);
  std::string is = std::string("xent ") + (sizeof(T) == 2 ? "bf16 " : "f32 ") + std::to_string(n) + " x " + std::to_string(vocab);
  RUN(T, xent, dim3(n), dim3(block), io.ptr(), dt.ptr(), numbers.ptr(), out.ptr(), vocab, terms);
  check(is + " loss", out.read(), loss, 2e-6);
  check(is + " gradient", io.read(), grad, tolerance<T>());
  auto fused = io.read();
  auto fused_loss = out.read();

  // A row alone.
  Buffer<T> last(std::vector<T>(x.end() - vocab, x.end()));
  Buffer<uint32_t> last_target(std::vector<uint32_t>{targets[n - 1]});
  RUN(T, xent, dim3(1), dim3(block), last.ptr(), last_target.ptr(), numbers.ptr(), out.ptr(), vocab, terms);
  check_same(is + " alone", last.read(), std::vector<T>(fused.end() - vocab, fused.end()));

  // Shards of the vocabulary.
  int width = vocab / shards;
  if (width * shards != vocab) return;
  std::vector<float> stats;
  std::vector<Buffer<T>*> parts;
  for (int s = 0; s < shards; ++s) {
    std::vector<T> part;
    for (int i = 0; i < n; ++i) part.insert(part.end(), &x[i * vocab + s * width], &x[i * vocab + s * width] + width);
    parts.push_back(new Buffer<T>(part));
    Buffer<float> one(3 * n);
    RUN(T, xent_stats, dim3(n), dim3(block), parts[s]->ptr(), dt.ptr(), s * width, one.ptr(), width);
    auto read = one.read();
    stats.insert(stats.end(), read.begin(), read.end());
  }
  Buffer<float> all(stats), combined(3 * n);
  LAUNCH(xent_combine, dim3((n + 255) / 256), dim3(256), 0, all.ptr(), shards, combined.ptr(), n);
  std::vector<T> joined(n * vocab);
  for (int s = 0; s < shards; ++s) {
    RUN(T, xent_grad, dim3(n), dim3(block), parts[s]->ptr(), dt.ptr(), s * width, combined.ptr(), numbers.ptr(), out.ptr(), width, terms);
    auto part = parts[s]->read();
    for (int i = 0; i < n; ++i) std::copy(&part[i * width], &part[i * width] + width, &joined[i * vocab + s * width]);
    check(is + " loss of a shard", out.read(), loss, 2e-6);
    delete parts[s];
  }
  check(is + " gradient of shards", joined, grad, tolerance<T>());
  if (shards == 1) {
    check_same(is + " one shard", joined, fused);
    check_same(is + " one shard's loss", out.read(), fused_loss);
  }
}

// Logits squeezed, whatever their number.
template <class T> void caps(int len, uint64_t seed) {
  Random r(seed);
  auto x = random_values<T>(r, len, 90);
  std::vector<double> y;
  for (auto v : x) y.push_back(30 * std::tanh(number(v) / 30));
  Buffer<T> io(x);
  RUN(T, soft_cap, dim3(2), dim3(256), io.ptr(), (long long)len, 30.0f);
  check("soft cap of " + std::to_string(len), io.read(), y, tolerance<T>());
}

int main() {
  for_seeds(3, [](uint64_t seed) {
    for (int shards : {1, 2, 4}) {
      losses<float>(3, 96, shards, 256, 4, seed);
      losses<uint16_t>(3, 96, shards, 256, 4, seed);
      losses<uint16_t>(2, 100, shards, 256, 30, seed);
      losses<float>(1, 8000, shards, 512, 8, seed);
      losses<uint16_t>(2, 5000, shards, 1024, 3, seed);
    }
    losses<float>(2, 33, 1, 256, 4, seed);
    for (Terms terms : {Terms{1, 0.3f, 0}, Terms{0.2f, 0, 1 / 30.0f}, Terms{1, 0.05f, 1 / 9.0f}}) {
      losses<float>(3, 96, 2, 256, 8, seed, terms);
      losses<uint16_t>(3, 1000, 1, 512, 8, seed, terms);
      losses<uint16_t>(2, 33, 1, 256, 8, seed, terms);
    }
    for (int len : {1, 33, 4096, 10001}) caps<float>(len, seed), caps<uint16_t>(len, seed);
    losses<uint16_t>(3, 5003, 1, 512, 4, seed);
    losses<float>(3, 2, 2, 256, 90, seed);
    if (ON_DEVICE) {
      losses<uint16_t>(300, 50257, 1, 512, 5, seed);
      losses<uint16_t>(300, 32000, 2, 512, 5, seed);
      losses<float>(64, 128256, 1, 512, 5, seed);
    }
    Random r(seed);
    for (int n : {1, 33, 3000}) {
      auto x = random_values<float>(r, n, 1, 1);
      double sum = 0;
      for (float v : x) sum += v;
      Buffer<float> dx(x);
      Buffer<double> out(1);
      LAUNCH(loss_sum, dim3(1), dim3(1024), 0, dx.ptr(), out.ptr(), n);
      check("loss sum", out.read(), {sum}, 1e-14);
    }
  });
  return finish();
}
