// Muon's elementwise kernels with the bits of their formulas, transposes, and weights scaled by greatest scores.
#include "../../kernels/muon.cu"
#include "../test.h"

static std::string of(const char* what, int n, uint64_t seed) {
  return std::string(what) + " " + std::to_string(n) + " seed " + std::to_string(seed);
}

// Each operation rounded, as the host's kernels do it; `volatile` keeps a compiler from fusing.
static void updates(int len, int decay, uint64_t seed) {
  Random r(seed);
  Numbers c{};
  c.grad_scale = 0.7f, c.keep = 0.999f, c.momentum = 0.95f, c.momentum_rest = 0.05f, c.minus_lr = -3e-2f;
  auto m = random_values<float>(r, len), g = random_values<float>(r, len), w = random_values<float>(r, len);
  std::vector<float> ahead(len), moved(len);
  std::vector<uint16_t> rounded;
  auto now = m;
  for (int i = 0; i < len; ++i) {
    volatile float scaled = g[i] * c.grad_scale, apart = scaled - m[i], more = c.momentum_rest * apart;
    now[i] = m[i] + more;
    volatile float left = now[i] - scaled, looked = c.momentum * left;
    ahead[i] = scaled + looked;
    volatile float kept = w[i] * (decay ? c.keep : 1.0f), step = c.minus_lr * ahead[i];
    moved[i] = kept + step;
    rounded.push_back(host_f2bf(moved[i]));
  }
  Buffer<Numbers> numbers(std::vector<Numbers>{c});
  Buffer<float> dm(m), dg(g), du(len), dw(w), master(w);
  Buffer<uint16_t> param(len);
  LAUNCH(muon_momentum, dim3(2), dim3(256), 0, dm.ptr(), du.ptr(), dg.ptr(), numbers.ptr(), (long long)len);
  check_same(of("momentum", len, seed), dm.read(), now);
  check_same(of("update", len, seed), du.read(), ahead);
  LAUNCH(muon_f32, dim3(1), dim3(256), 0, dw.ptr(), du.ptr(), numbers.ptr(), (long long)len, decay);
  LAUNCH(muon_bf16, dim3(3), dim3(256), 0, param.ptr(), master.ptr(), du.ptr(), numbers.ptr(), (long long)len, decay);
  check_same(of("weights", len, seed), dw.read(), moved);
  check_same(of("masters", len, seed), master.read(), moved);
  check_same(of("parameters", len, seed), param.read(), rounded);
}

static void matrices(int rows, int cols, uint64_t seed) {
  Random r(seed);
  int len = rows * cols;
  auto x = random_values<float>(r, len), square = random_values<float>(r, size_t(rows) * rows);
  auto gram = random_values<float>(r, size_t(rows) * rows);
  std::vector<float> turned(len), scaled(len), divided(len), back(len);
  double squares = 2.25;
  for (int i = 0; i < len; ++i) turned[i % cols * rows + i / cols] = x[i];
  for (int i = 0; i < len; ++i) scaled[i] = x[i] * 0.3f, divided[i] = x[i] * float(1.0 / 1.5);
  for (int i = 0; i < len; ++i) back[i] = scaled[i] * float(double(0.3f) / std::sqrt(1.5));
  Buffer<float> dx(x), to(len), dy(x), dgram(gram), dsquare(square);
  Buffer<double> sum(std::vector<double>{squares}), none(std::vector<double>{0.0});
  LAUNCH(transpose, dim3((cols + 31) / 32, (rows + 31) / 32), dim3(256), 0, dx.ptr(), to.ptr(), rows, cols);
  check_same(of("transpose", rows, seed) + " x " + std::to_string(cols), to.read(), turned);
  LAUNCH(scale, dim3(2), dim3(256), 0, dy.ptr(), 0.3f, (long long)len);
  check_same(of("scale", len, seed), dy.read(), scaled);
  LAUNCH(scale_back, dim3(2), dim3(256), 0, dy.ptr(), 0.3f, sum.ptr(), 1e-14, (long long)len);
  check_same(of("scale back", len, seed), dy.read(), back);
  dy.write(x);
  LAUNCH(normalise, dim3(2), dim3(256), 0, dy.ptr(), sum.ptr(), 1e-14, (long long)len);
  check_same(of("normalise", len, seed), dy.read(), divided);
  dy.fill(0);
  LAUNCH(normalise, dim3(1), dim3(256), 0, dy.ptr(), none.ptr(), 1e-14, (long long)len);
  check_same(of("normalise nothing", len, seed), dy.read(), std::vector<float>(len));
  auto shifted = gram, cube = random_values<float>(r, size_t(rows) * rows), sums = cube, onto = cube;
  for (int i = 0; i < rows * rows; ++i) {
    volatile float a = 3.0f * gram[i], b = -4.775f * square[i], c = 2.0315f * cube[i], two = a + b, three = two + c;
    volatile float one = two + cube[i];
    bool diagonal = i / rows == i % rows;
    sums[i] = diagonal ? three + 3.4445f : three, onto[i] = diagonal ? one + 3.4445f : one;
    if (diagonal) shifted[i] -= 0.5f;
  }
  Buffer<float> dcube(cube), dsums(size_t(rows) * rows);
  LAUNCH(matrix_sum, dim3(2), dim3(256), 0, dgram.ptr(), dsquare.ptr(), dcube.ptr(), dsums.ptr(), 3.4445f, 3.0f, -4.775f,
         2.0315f, rows);
  check_same(of("sum", rows, seed), dsums.read(), sums);
  LAUNCH(matrix_sum, dim3(2), dim3(256), 0, dgram.ptr(), dsquare.ptr(), dcube.ptr(), dcube.ptr(), 3.4445f, 3.0f, -4.775f,
         1.0f, rows);
  check_same(of("sum in place", rows, seed), dcube.read(), onto);
  LAUNCH(shift, dim3(1), dim3(256), 0, dgram.ptr(), -0.5f, rows);
  check_same(of("shift", rows, seed), dgram.read(), shifted);
  // Two parts, side by side by columns.
  Buffer<float> both(2 * len);
  std::vector<float> beside(2 * len);
  for (int i = 0; i < len; ++i) beside[i / cols * 2 * cols + i % cols] = beside[i / cols * 2 * cols + cols + i % cols] = x[i];
  for (int part = 0; part < 2; ++part) {
    LAUNCH(copy_block, dim3(2), dim3(256), 0, dx.ptr(), (long long)cols, both + part * cols, 2LL * cols, rows, cols);
  }
  check_same(of("copy", len, seed), both.read(), beside);
}

// Heads of which some have scores that are too great, one of them on another rank; rows that lie here in part.
static void clips(int sequences, int sequence, uint64_t seed) {
  Random r(seed);
  const int heads = 4, width = 5, head = 3, ranks = 2, apart = heads + 2;
  auto maxima = random_values<float>(r, size_t(sequences) * heads * sequence, 10);
  for (int i = 0; i < sequences; ++i) maxima[(size_t(i) * heads + 2) * sequence + sequence - 1] = 100.0f + float(i);
  std::vector<double> greatest(ranks * apart, 0.25), expected = greatest;
  for (size_t i = 0; i < maxima.size(); ++i) {
    auto& of_head = expected[i / sequence % heads];
    of_head = std::max(of_head, double(maxima[i]));
  }
  Buffer<float> dmaxima(maxima);
  Buffer<double> dgreatest(greatest);
  LAUNCH(logit_max, dim3(heads), dim3(256), 0, dmaxima.ptr(), dgreatest.ptr(), sequences, sequence);
  check_same(of("greatest scores", sequence, seed), dgreatest.read(), expected);
  expected[apart + 0] = 400.0;
  dgreatest.write(expected);
  std::vector<Scaled> spans;
  for (int h = 0; h < heads; ++h) spans.push_back({h * head, h * head + head, h, h + 1, h == 2});
  spans.push_back({heads * head, heads * head + head, 1, 4, 0});
  const double tau = 20.0;
  int first = 2 * width + 1, count = (heads + 1) * head * width - first - 7;
  auto w = random_values<float>(r, size_t(count));
  auto scaled = w;
  for (auto& s : spans) {
    double most = 0;
    for (int rank = 0; rank < ranks; ++rank) {
      for (auto h = s.head0; h < s.heads_end; ++h) most = std::max(most, expected[size_t(rank * apart + h)]);
    }
    if (most <= tau) continue;
    float by = float(s.alone ? tau / most : std::sqrt(tau / most));
    for (auto i = s.row0 * width; i < s.rows_end * width; ++i) {
      if (i >= first && i - first < count) scaled[size_t(i - first)] *= by;
    }
  }
  std::vector<uint16_t> rounded, before;
  for (size_t i = 0; i < w.size(); ++i) before.push_back(host_f2bf(w[i])), rounded.push_back(host_f2bf(scaled[i]));
  Buffer<Scaled> dspans(spans);
  Buffer<float> dw(w), master(w);
  Buffer<uint16_t> param(before);
  dim3 grid(2, unsigned(spans.size()));
  LAUNCH(qk_clip_f32, grid, dim3(256), 0, dw.ptr(), dspans.ptr(), dgreatest.ptr(), ranks, (long long)apart, tau,
         (long long)first, (long long)count, width);
  LAUNCH(qk_clip_bf16, grid, dim3(256), 0, param.ptr(), master.ptr(), dspans.ptr(), dgreatest.ptr(), ranks,
         (long long)apart, tau, (long long)first, (long long)count, width);
  check_same(of("clipped", sequence, seed), dw.read(), scaled);
  check_same(of("clipped masters", sequence, seed), master.read(), scaled);
  check_same(of("clipped parameters", sequence, seed), param.read(), rounded);
}

int main() {
  for_seeds(3, [](uint64_t seed) {
    for (int len : {1, 33, 1500}) updates(len, int(seed % 2), seed);
    matrices(1, 1, seed);
    matrices(33, 70, seed);
    matrices(64, 31, seed);
    clips(1, 1, seed);
    clips(3, 300, seed);
  });
  return finish();
}
