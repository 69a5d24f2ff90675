// Kernels over rows against their formulas in double precision, in bf16 and f32, aligned widths and others.
#include "../../kernels/rows.cu"
#include "../../kernels/glu.cu"
#include "rows.h"

// One row of either norm and of its gradient.
struct Formula {
  Numbers64 y, dx;
  double mean = 0, rstd;
};
static Formula norm_of(const double* x, const double* w, const double* b, const double* dy, int dim, double eps) {
  Formula f;
  double squares = 0, slope = 0, dot = 0;
  for (int i = 0; b && i < dim; ++i) f.mean += x[i] / dim;
  for (int i = 0; i < dim; ++i) squares += (x[i] - f.mean) * (x[i] - f.mean) / dim;
  f.rstd = 1 / std::sqrt(squares + eps);
  for (int i = 0; i < dim; ++i) {
    double normed = (x[i] - f.mean) * f.rstd;
    f.y.push_back(normed * w[i] + (b ? b[i] : 0));
    slope += b ? dy[i] * w[i] / dim : 0;
    dot += dy[i] * w[i] * normed / dim;
  }
  for (int i = 0; i < dim; ++i) f.dx.push_back(f.rstd * (dy[i] * w[i] - slope - (x[i] - f.mean) * f.rstd * dot));
  return f;
}

template <class T> void norms(int n, int dim, uint64_t seed) {
  Random r(seed);
  auto x = random_values<T>(r, n * dim, 1, 0.3), w = random_values<T>(r, dim, 1, 1), b = random_values<T>(r, dim);
  auto dy = random_values<T>(r, n * dim), acc = random_values<T>(r, n * dim);
  auto x64 = numbers_of(x), w64 = numbers_of(w), b64 = numbers_of(b), dy64 = numbers_of(dy), acc64 = numbers_of(acc);
  double tol = tolerance<T>();
  Buffer<T> dx_(x), dw_(w), db_(b), ddy(dy);
  for (bool layer : {false, true}) {
    Numbers64 y, dx, rstd, mean;
    for (int i = 0; i < n; ++i) {
      auto f = norm_of(&x64[i * dim], w64.data(), layer ? b64.data() : nullptr, &dy64[i * dim], dim, 1e-5);
      y.insert(y.end(), f.y.begin(), f.y.end());
      dx.insert(dx.end(), f.dx.begin(), f.dx.end());
      rstd.push_back(f.rstd), mean.push_back(f.mean);
    }
    Numbers64 stats = layer ? mean : Numbers64();
    stats.insert(stats.end(), rstd.begin(), rstd.end());
    Buffer<T> out(n * dim), back(n * dim);
    Buffer<float> kept(stats.size());
    int block = threads_of(dim);
    const char* of = layer ? "layer_norm" : "rms_norm";
    auto forward = [&](T* from, T* to, float* st, int rows) {
      if (layer) RUN(T, layer_norm, dim3(rows), dim3(block), from, dw_.ptr(), db_.ptr(), to, st, rows, dim, 1e-5f);
      else RUN(T, rms_norm, dim3(rows), dim3(block), from, dw_.ptr(), to, st, dim, 1e-5f);
    };
    forward(dx_, out, kept, n);
    check(name<T>(of, n, dim, seed), out.read(), y, tol);
    check(name<T>(of, n, dim, seed) + " stats", kept.read(), stats, 1e-6);
    // The last row alone has the bits that it had among others.
    Buffer<T> alone(dim), last(std::vector<T>(x.end() - dim, x.end()));
    Buffer<float> alone_stats(2);
    forward(last, alone, alone_stats, 1);
    auto all = out.read();
    check_same(name<T>(of, n, dim, seed) + " alone", alone.read(), std::vector<T>(all.end() - dim, all.end()));
    auto backward = [&](const T* acc, T* to) {
      if (layer) RUN(T, layer_norm_dx, dim3(n), dim3(block), ddy.ptr(), dx_.ptr(), dw_.ptr(), kept.ptr(), acc, to, n, dim);
      else RUN(T, rms_norm_dx, dim3(n), dim3(block), ddy.ptr(), dx_.ptr(), dw_.ptr(), kept.ptr(), acc, to, dim);
    };
    backward(nullptr, back);
    check(name<T>(of, n, dim, seed) + " dx", back.read(), dx, tol);
    Buffer<T> sum(acc);
    backward(sum, sum);
    Numbers64 more = dx;
    for (size_t i = 0; i < more.size(); ++i) more[i] += acc64[i];
    check(name<T>(of, n, dim, seed) + " dx in place", sum.read(), more, tol);
  }
}

template <class T> void head_norms(int n, int heads, int kv, int dim, uint64_t seed) {
  Random r(seed);
  int normed = heads + kv, ld = (normed + kv) * dim;
  auto qkv = random_values<T>(r, n * ld), dy = random_values<T>(r, n * ld);
  auto wq = random_values<T>(r, dim, 1, 1), wk = random_values<T>(r, dim, 1, 1);
  auto x64 = numbers_of(qkv), dy64 = numbers_of(dy), q64 = numbers_of(wq), k64 = numbers_of(wk);
  Numbers64 y = x64, dx = dy64, rstd;
  for (int i = 0; i < n; ++i) {
    for (int h = 0; h < normed; ++h) {
      int at = i * ld + h * dim;
      auto f = norm_of(&x64[at], h < heads ? q64.data() : k64.data(), nullptr, &dy64[at], dim, 1e-6);
      rstd.push_back(f.rstd);
      for (int j = 0; j < dim; ++j) y[at + j] = f.y[j], dx[at + j] = f.dx[j];
    }
  }
  Buffer<T> in(qkv), ddy(dy), q(wq), k(wk), out(n * ld), back(n * ld);
  Buffer<float> st(n * normed);
  int block = threads_of(normed * dim);
  auto is = name<T>("head norm", n, dim, seed);
  RUN(T, qk_norm, dim3(n), dim3(block), in.ptr(), q.ptr(), k.ptr(), out.ptr(), st.ptr(), heads, kv, dim, 1e-6f);
  check(is, out.read(), y, tolerance<T>());
  check(is + " rstd", st.read(), rstd, 1e-6);
  RUN(T, qk_norm_dx, dim3(n), dim3(block), ddy.ptr(), in.ptr(), q.ptr(), k.ptr(), st.ptr(), back.ptr(), heads, kv, dim);
  check(is + " dx", back.read(), dx, tolerance<T>());
}

template <class T> void ropes(int n, int sequence, int heads, int kv, int dim, int position0, int inverse, uint64_t seed) {
  Random r(seed);
  int half = dim / 2, ld = (heads + 2 * kv) * dim;
  auto qkv = random_values<T>(r, n * ld);
  std::vector<float> cosines, sines;
  for (int p = 0; p < position0 + sequence; ++p) {
    for (int j = 0; j < half; ++j) {
      double angle = p * std::pow(10000.0, -double(j) / half);
      cosines.push_back(float(std::cos(angle))), sines.push_back(float(std::sin(angle)));
    }
  }
  auto y = numbers_of(qkv), x = y;
  for (int i = 0; i < n; ++i) {
    for (int h = 0; h < heads + kv; ++h) {
      for (int j = 0; j < half; ++j) {
        int a = i * ld + h * dim + j, at = (position0 + i % sequence) * half + j;
        double c = cosines[at], s = inverse ? -sines[at] : sines[at];
        y[a] = x[a] * c - x[a + half] * s;
        y[a + half] = x[a + half] * c + x[a] * s;
      }
    }
  }
  Buffer<T> io(qkv);
  Buffer<float> dc(cosines), ds(sines);
  RUN(T, rope, dim3(n), dim3(threads_of((heads + kv) * dim)), io.ptr(), dc.ptr(), ds.ptr(), sequence, heads, kv, dim,
      position0, inverse);
  check(name<T>("rope", n, dim, seed), io.read(), y, tolerance<T>());
}

template <class T> void embeds(int n, int sequence, int dim, uint64_t seed) {
  Random r(seed);
  int vocab0 = 5, rows = 7;
  int front = sequence / 2, back = 5 * front;  // a rank's two pieces of a longer sequence
  auto table = random_values<T>(r, rows * dim), positions = random_values<T>(r, 6 * sequence * dim);
  std::vector<uint32_t> ids(n);
  for (auto& id : ids) id = uint32_t(r.below(16));
  Buffer<uint32_t> dids(ids);
  Buffer<T> dt(table), dp(positions);
  for (bool placed : {false, true}) {
    Numbers64 y;
    for (int t = 0; t < n; ++t) {
      int row = int(ids[t]) - vocab0, i = t % sequence, place = i < sequence / 2 ? front + i : back + i - sequence / 2;
      for (int j = 0; j < dim; ++j) {
        y.push_back((row >= 0 && row < rows ? number(table[row * dim + j]) : 0) +
                    (placed ? number(positions[place * dim + j]) : 0));
      }
    }
    Buffer<T> out(n * dim);
    RUN(T, embed, dim3(n), dim3(threads_of(dim)), dids.ptr(), dt.ptr(), placed ? dp.ptr() : (T*)nullptr, out.ptr(), vocab0,
        rows, sequence, front, back, dim);
    check(name<T>("embed", n, dim, seed), out.read(), y, placed ? tolerance<T>() : 0);
  }
}

static double gelu64(double x, bool by_tanh) {
  double inner = std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x);
  return by_tanh ? 0.5 * x * (1 + std::tanh(inner)) : 0.5 * x * std::erfc(-x / std::sqrt(2.0));
}

template <class T> void elements(int n, int F, int blocks, uint64_t seed) {
  Random r(seed);
  auto gu = random_values<T>(r, n * 2 * F, 9), dh = random_values<T>(r, n * F), b = random_values<T>(r, F);
  auto a = random_values<T>(r, n * F, 6);
  Numbers64 h, dgu(n * 2 * F), bounded, dbounded(n * 2 * F), sum, sum_b;
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < F; ++j) {
      double g = number(gu[i * 2 * F + j]), u = number(gu[i * 2 * F + F + j]), d = number(dh[i * F + j]);
      double s = 1 / (1 + std::exp(-g));
      h.push_back(g * s * u);
      dgu[i * 2 * F + j] = d * u * s * (1 + g * (1 - s));
      dgu[i * 2 * F + F + j] = d * g * s;
      // With bounds that a part of them passes.
      double top = std::min(g, 7.0), middle = std::max(-7.0, std::min(u, 7.0)), s2 = 1 / (1 + std::exp(-1.702 * top));
      bounded.push_back(top * s2 * (middle + 1));
      dbounded[i * 2 * F + j] = g > 7 ? 0 : d * (middle + 1) * (s2 + 1.702 * top * s2 * (1 - s2));
      dbounded[i * 2 * F + F + j] = std::abs(u) > 7 ? 0 : d * top * s2;
      sum.push_back(number(a[i * F + j]) + d);
      sum_b.push_back(sum.back() + number(b[j]));
    }
  }
  double tol = tolerance<T>();
  long long len = (long long)n * F;
  dim3 grid(blocks), block(256);
  Buffer<T> dgu_(gu), ddh(dh), da(a), db(b), out(n * F), wide(n * 2 * F);
  auto is = name<T>("elements", n, F, seed);
  RUN(T, swiglu, grid, block, dgu_.ptr(), out.ptr(), n, F);
  check(is + " swiglu", out.read(), h, tol);
  RUN(T, swiglu_dx, grid, block, ddh.ptr(), dgu_.ptr(), wide.ptr(), n, F);
  check(is + " swiglu dx", wide.read(), dgu, tol);
  RUN(T, swiglu_clamped, grid, block, dgu_.ptr(), out.ptr(), n, F);
  check(is + " swiglu with bounds", out.read(), bounded, tol);
  RUN(T, swiglu_clamped_dx, grid, block, ddh.ptr(), dgu_.ptr(), wide.ptr(), n, F);
  check(is + " swiglu with bounds dx", wide.read(), dbounded, tol);
  RUN(T, add, grid, block, da.ptr(), ddh.ptr(), (T*)nullptr, out.ptr(), len, F);
  check(is + " add", out.read(), sum, tol);
  RUN(T, add, grid, block, da.ptr(), ddh.ptr(), db.ptr(), out.ptr(), len, F);
  check(is + " add bias", out.read(), sum_b, tol);
  for (int by_tanh : {0, 1}) {
    Numbers64 y, dx;
    for (int i = 0; i < n * F; ++i) {
      double x = number(a[i]), e = 1e-5;
      y.push_back(gelu64(x, by_tanh));
      dx.push_back(number(dh[i]) * (gelu64(x + e, by_tanh) - gelu64(x - e, by_tanh)) / (2 * e));
    }
    RUN(T, gelu, grid, block, da.ptr(), out.ptr(), len, by_tanh);
    check(is + " gelu", out.read(), y, tol);
    RUN(T, gelu_dx, grid, block, ddh.ptr(), da.ptr(), out.ptr(), len, by_tanh);
    check(is + " gelu dx", out.read(), dx, tol);
  }
}

// Elements left out at random: those of the formula, whatever the launch.
template <class T> void dropouts(int n, int dim, int blocks, uint64_t seed) {
  Random r(seed);
  auto x = random_values<T>(r, n * dim), b = random_values<T>(r, dim), held = random_values<T>(r, n * dim);
  Numbers c{};
  c.draws = r.next();
  uint64_t site = r.next();
  uint32_t cut = 13107;
  float scale = float(1 / (1 - cut / 65536.0));
  Rows rows{5, 9, 4, 2, 12};  // positions 2, 3, 12, 13 of sequences from 10 on
  const int positions[] = {2, 3, 12, 13};
  auto mixed = [](uint64_t state) {
    Random at(0);
    at.state = state;
    return at.next();
  };
  Buffer<Numbers> numbers(std::vector<Numbers>{c});
  Buffer<T> dx(x), db(b), dh(held), out(n * dim);
  for (int how : {0, 1, 2}) {
    Numbers64 y;
    int left_out = 0;
    for (int i = 0; i < n; ++i) {
      uint64_t place = uint64_t(9 + (5 + i) / 4) << 32 | uint64_t(positions[(5 + i) % 4]);
      uint64_t key = mixed(site ^ c.draws ^ mixed(place));
      for (int j = 0; j < dim; ++j) {
        uint64_t drawn = mixed(key + uint64_t(j / 4) * 0x9e3779b97f4a7c15ull) >> (j % 4 * 16) & 0xffff;
        left_out += drawn < cut;
        double v = number(x[i * dim + j]) + (how > 0 ? number(b[j]) : 0);
        y.push_back((drawn < cut ? 0 : v * scale) + (how > 1 ? number(held[i * dim + j]) : 0));
      }
    }
    auto is = name<T>("dropout", n, dim, seed) + " " + std::to_string(how);
    // In place where something is added.
    T* to = how > 1 ? dh.ptr() : out.ptr();
    RUN(T, dropout, dim3(blocks), dim3(256), dx.ptr(), how > 0 ? db.ptr() : (T*)nullptr, how > 1 ? to : (T*)nullptr, to,
        site, numbers.ptr(), rows, n, dim, cut, scale);
    check(is, how > 1 ? dh.read() : out.read(), y, tolerance<T>());
    if (n * dim > 300) report(is + " share", std::abs(left_out / double(n * dim) - 0.2) < 0.07, left_out);
  }
}

template <class T> void all(uint64_t seed) {
  for (int dim : {8, 33, 100, 768}) norms<T>(3, dim, seed);
  norms<T>(1, 2048, seed);
  norms<T>(2, seed % 2 ? 4104 : 2056, seed);
  norms<T>(1, seed % 2 ? 8200 : 6000, seed);
  head_norms<T>(3, 4, 2, 16, seed);
  head_norms<T>(2, 3, 1, 20, seed);
  head_norms<T>(2, 10, 2, 128, seed);
  head_norms<T>(1, 2, 1, 264, seed);
  ropes<T>(6, 3, 4, 2, 16, 0, 0, seed);
  ropes<T>(3, 3, 2, 1, 64, 2, 1, seed);
  ropes<T>(2, 2, 2, 1, 12, 1, 0, seed);
  embeds<T>(9, 4, 48, seed);
  embeds<T>(5, 5, 33, seed);
  elements<T>(3, 64, 1, seed);
  elements<T>(2, 33, 2, seed);
  elements<T>(5, 1000, 2, seed);
  for (int dim : {8, 33, 96}) dropouts<T>(7, dim, 2, seed);
  if (ON_DEVICE) {
    for (int dim : {768, 1024, 2048, 4096, 8192}) norms<T>(513, dim, seed);
      head_norms<T>(300, 16, 8, 128, seed);
    elements<T>(300, 2048, 300, seed);
    ropes<T>(600, 300, 16, 8, 128, 0, 0, seed);
  }
}

int main() {
  for_seeds(3, [](uint64_t seed) {
    all<uint16_t>(seed);
    all<float>(seed);
  });
  return finish();
}
