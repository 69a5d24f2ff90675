// AdamW with the bits of its formula in f32, and norms in f64.
#include "../../kernels/optim.cu"
#include "../test.h"

// Each operation rounded, as the host's kernels do it; `volatile` keeps a compiler from fusing.
static float formula(const Numbers& c, float keep, float& w, float& m, float& v, float gradient) {
  volatile float g = gradient * c.grad_scale, kept = w * keep, d = g - m, moved = c.one_minus_beta1 * d;
  m = m + moved;
  volatile float decayed = v * c.beta2, part = c.one_minus_beta2 * g, square = part * g;
  v = decayed + square;
  volatile float root = std::sqrt(v), corrected = root / c.root_correction2, under = corrected + c.eps;
  volatile float over = c.minus_step_size * m, change = over / under;
  return w = kept + change;
}

static void updates(int len, int blocks, int decay, uint64_t seed) {
  Random r(seed);
  Numbers c{1.0f, 0.7f, 0.999f, 0.1f, 0.95f, 0.05f, 0.31f, 1e-8f, -3e-4f};
  auto w = random_values<float>(r, len), m = random_values<float>(r, len, 1e-3), v = random_values<float>(r, len, 1e-6, 1e-6);
  auto g = random_values<float>(r, len, 1e-3);
  Buffer<Numbers> numbers(std::vector<Numbers>{c});
  Buffer<float> dg(g);
  std::string is = "adamw " + std::to_string(len);
  for (bool half : {false, true}) {
    Buffer<float> dw(w), dm(m), dv(v);
    Buffer<uint16_t> param(len);
    if (half) LAUNCH(adamw_bf16, dim3(blocks), dim3(256), 0, param.ptr(), dw.ptr(), dm.ptr(), dv.ptr(), dg.ptr(), numbers.ptr(), (long long)len, decay);
    else LAUNCH(adamw_f32, dim3(blocks), dim3(256), 0, dw.ptr(), dm.ptr(), dv.ptr(), dg.ptr(), numbers.ptr(), (long long)len, decay);
    auto ew = w, em = m, ev = v;
    std::vector<uint16_t> rounded;
    for (int i = 0; i < len; ++i) rounded.push_back(host_f2bf(formula(c, decay ? c.keep : 1.0f, ew[i], em[i], ev[i], g[i])));
    check_same(is + " w", dw.read(), ew);
    check_same(is + " m", dm.read(), em);
    check_same(is + " v", dv.read(), ev);
    if (half) check_same(is + " bf16", param.read(), rounded);
  }
}

// Tensors of all lengths in one launch have the bits that each has alone.
static void together(uint64_t seed) {
  Random r(seed);
  std::vector<int> lengths = {4096, 1, 33, 5000, 4097, 8192, 4};
  for (int i = 0; i < 40; ++i) lengths.push_back(1 + r.below(100));
  int total = 0;
  // A multiple of 4 between them, so that they are aligned, but for the last ones.
  std::vector<int> at;
  for (int len : lengths) at.push_back(total), total += at.size() < 40 ? (len + 3) / 4 * 4 : len;
  auto w = random_values<float>(r, total), m = random_values<float>(r, total, 1e-3);
  auto v = random_values<float>(r, total, 1e-6, 1e-6), g = random_values<float>(r, total, 1e-3);
  Buffer<Numbers> numbers(std::vector<Numbers>{{1.0f, 0.7f, 0.999f, 0.1f, 0.95f, 0.05f, 0.31f, 1e-8f, -3e-4f}});
  Buffer<float> dg(g), w1(w), m1(m), v1(v), w2(w), m2(m), v2(v);
  Buffer<uint16_t> p1(total), p2(total);
  Buffer<double> s1(2 * lengths.size()), s2(2 * lengths.size());
  p1.fill(0), p2.fill(0), s1.fill(0), s2.fill(0);
  std::vector<Updated> updates;
  std::vector<Squared> squares;
  long long blocks = 0, chunks = 0;
  for (size_t i = 0; i < lengths.size(); ++i) {
    int a = at[i], half = int(i % 3 != 0), decay = int(i % 2);
    long long len = lengths[i];
    updates.push_back({w2 + a, m2 + a, v2 + a, dg + a, half ? p2 + a : nullptr, len, blocks, decay});
    squares.push_back({dg + a, s2 + chunks, len, chunks});
    if (half) LAUNCH(adamw_bf16, dim3(1), dim3(256), 0, p1 + a, w1 + a, m1 + a, v1 + a, dg + a, numbers.ptr(), len, decay);
    else LAUNCH(adamw_f32, dim3(1), dim3(256), 0, w1 + a, m1 + a, v1 + a, dg + a, numbers.ptr(), len, decay);
    int of = int((len + NORM_CHUNK - 1) / NORM_CHUNK);
    LAUNCH(sum_squares, dim3(of), dim3(256), 0, dg + a, s1 + chunks, len);
    chunks += of;
    blocks += (len + UPDATE_CHUNK - 1) / UPDATE_CHUNK;
  }
  Buffer<Updated> table(updates);
  Buffer<Squared> of_squares(squares);
  LAUNCH(adamw_all, dim3(int(blocks)), dim3(256), 0, table.ptr(), int(updates.size()), numbers.ptr());
  LAUNCH(sum_squares_all, dim3(int(chunks)), dim3(256), 0, of_squares.ptr(), int(squares.size()));
  check_same("together w", w2.read(), w1.read());
  check_same("together m", m2.read(), m1.read());
  check_same("together v", v2.read(), v1.read());
  check_same("together bf16", p2.read(), p1.read());
  check_same("together squares", s2.read(), s1.read());
}

// Averages of weights, with the bits of their formula, and weights that change places with them.
static void averages(int len, uint64_t seed) {
  Random r(seed);
  Numbers c{};
  c.average_keep = 0.75f, c.average_share = 0.25f;
  auto w = random_values<float>(r, len), mean = random_values<float>(r, len), expected = mean;
  for (int i = 0; i < len; ++i) {
    volatile float kept = c.average_keep * mean[i], more = c.average_share * w[i];
    expected[i] = kept + more;
  }
  std::string is = "average of " + std::to_string(len);
  Buffer<Numbers> numbers(std::vector<Numbers>{c});
  Buffer<float> dw(w), dm(mean);
  LAUNCH(average, dim3(2), dim3(256), 0, dm.ptr(), dw.ptr(), numbers.ptr(), (long long)len);
  check_same(is, dm.read(), expected);
  LAUNCH(swap_average_f32, dim3(2), dim3(256), 0, dw.ptr(), dm.ptr(), (long long)len);
  check_same(is + " in place", dw.read(), expected);
  check_same(is + " weights kept", dm.read(), w);
  Buffer<uint16_t> param(len);
  LAUNCH(swap_average_bf16, dim3(3), dim3(256), 0, param.ptr(), dw.ptr(), dm.ptr(), (long long)len);
  check_same(is + " back", dw.read(), w);
  check_same(is + " back, average", dm.read(), expected);
  std::vector<uint16_t> rounded;
  for (float x : w) rounded.push_back(host_f2bf(x));
  check_same(is + " back, parameter", param.read(), rounded);
}

int main() {
  for_seeds(3, together);
  for_seeds(3, [](uint64_t seed) {
    for (int len : {1, 4, 33, 1024, 2500}) updates(len, 1 + int(seed % 2), int(seed % 2), seed);
    for (int len : {1, 33, 4097}) averages(len, seed);
    Random r(seed);
    for (int len : {1, 33, 4096, 4097, 13000}) {
      auto x = random_values<float>(r, len);
      int chunks = (len + NORM_CHUNK - 1) / NORM_CHUNK;
      std::vector<double> expected(chunks), total(1);
      for (int i = 0; i < len; ++i) expected[i / NORM_CHUNK] += double(x[i]) * x[i], total[0] += double(x[i]) * x[i];
      Buffer<float> dx(x);
      Buffer<double> partials(chunks), sum(1);
      LAUNCH(sum_squares, dim3(chunks), dim3(256), 0, dx.ptr(), partials.ptr(), (long long)len);
      check("sum of squares " + std::to_string(len), partials.read(), expected, 1e-13);
      LAUNCH(sum_f64, dim3(1), dim3(1024), 0, partials.ptr(), sum.ptr(), (long long)chunks);
      check("their sum " + std::to_string(len), sum.read(), total, 1e-13);
    }
    auto x = random_values<double>(r, 5000);
    std::vector<double> total(1);
    for (double v : x) total[0] += v;
    Buffer<double> dx(x), sum(1);
    LAUNCH(sum_f64, dim3(1), dim3(1024), 0, dx.ptr(), sum.ptr(), 5000LL);
    check("sum of 5000", sum.read(), total, 1e-12);
  });
  return finish();
}
