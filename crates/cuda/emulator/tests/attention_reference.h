// Causal attention with grouped queries and its derivative in double precision.
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <thread>
#include <vector>

#include "../../kernels/dropout.h"
#include "../test.h"

struct AttentionShape {
  int sequences, sequence, heads, kv_heads, dim;
  int group() const { return heads / kv_heads; }
  size_t tokens() const { return size_t(sequences) * sequence; }
  size_t width() const { return size_t(heads + kv_heads) * dim + size_t(kv_heads) * values(); }
  size_t qkv_len() const { return tokens() * width(); }
  size_t o_len() const { return tokens() * heads * values(); }
  size_t lse_len() const { return tokens() * heads; }
  float scale() const { return 1.0f / std::sqrt(float(dim)); }
  // What bounds the keys that are seen, and a score for each head that softmaxes sum as well, if any.
  int window = 0;
  std::vector<uint32_t> starts = {};
  std::vector<double> sinks = {};
  int first(int seq, int t) const {
    int key = window > 0 ? std::max(t + 1 - window, 0) : 0;
    return starts.empty() ? key : std::max(key, int(starts[size_t(seq) * sequence + t]));
  }
  int value_dim = 0;  // of values and outputs, where it is another than that of queries and keys
  int values() const { return value_dim > 0 ? value_dim : dim; }
  // Which probabilities are left out, if any: draws below `cut`, from `site` and `draws`. The first sequence and head
  // have these places.
  uint32_t cut = 0;
  uint64_t site = 0, draws = 0;
  int sequence0 = 0, head0 = 0;
  void leave_some_out(Random& r) {
    cut = 16000 + uint32_t(r.below(1000));
    site = r.next(), draws = r.next();
    sequence0 = 1 + r.below(1000), head0 = 1 + r.below(100);
  }
  double factor() const { return 1 / (1 - cut / 65536.0); }
  // What a probability is multiplied by.
  double kept(int seq, int head, int t, int j) const {
    if (cut == 0) return 1;
    auto mixed = [](uint64_t state) {
      Random at(0);
      at.state = state;
      return at.next();
    };
    uint64_t plane = mixed((site ^ draws) + mixed(uint64_t(head0 + head)));
    uint64_t row = mixed(plane ^ mixed(uint64_t(sequence0 + seq) << 32 | uint64_t(t)));
    uint64_t drawn = mixed(row + uint64_t(j / 4) * 0x9e3779b97f4a7c15ull) >> (j % 4 * 16) & 0xffff;
    return drawn < cut ? 0 : factor();
  }
  bool bounded() const { return window > 0 || !starts.empty() || !sinks.empty() || cut > 0; }
};

// What a shape leaves out, as kernels take it.
struct LeftOut {
  Buffer<Numbers> numbers;
  explicit LeftOut(const AttentionShape& s) : numbers(std::vector<Numbers>(1)) {
    Numbers n{};
    n.draws = s.draws;
    numbers.write({n});
  }
  // From a sequence of the shape on.
  Drops of(const AttentionShape& s, int from) const {
    return s.cut == 0 ? NO_DROPS : Drops{numbers.ptr(), s.site, s.sequence0 + from, s.head0, s.cut, float(s.factor())};
  }
};

struct AttentionReference {
  std::vector<double> o, lse, dqkv, maxima, dsinks;
};

// Calls `work(i)` for i < n, on all cores.
inline void in_parallel(int n, const std::function<void(int)>& work) {
  int count = std::max(1, std::min<int>(n, int(std::thread::hardware_concurrency())));
  std::vector<std::thread> threads;
  for (int t = 0; t < count; ++t) {
    threads.emplace_back([=, &work] {
      for (int i = t; i < n; i += count) work(i);
    });
  }
  for (auto& t : threads) t.join();
}

inline double dot_of(const double* a, const double* b, int n) {
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}
inline void add_to(double* to, double factor, const double* x, int n) {
  for (int i = 0; i < n; ++i) to[i] += factor * x[i];
}

inline AttentionReference attention_reference(const AttentionShape& s, const std::vector<double>& qkv,
                                              const std::vector<double>& d_o) {
  AttentionReference r;
  r.o.assign(s.o_len(), 0.0);
  r.lse.assign(s.lse_len(), 0.0);
  r.dqkv.assign(s.qkv_len(), 0.0);
  r.maxima.assign(s.lse_len(), 0.0);
  r.dsinks.assign(s.heads, 0.0);
  std::vector<double> delta(s.lse_len());
  int d = s.dim, e = s.values(), n = s.sequence;
  double scale = s.scale();
  auto row = [&](int seq, int t, int head) { return (size_t(seq) * n + t) * s.width() + size_t(head) * d; };
  auto value = [&](int seq, int t, int head) { return row(seq, t, s.heads + s.kv_heads) + size_t(head) * e; };
  auto out = [&](int seq, int t, int head) { return ((size_t(seq) * n + t) * s.heads + head) * e; };
  auto stat = [&](int seq, int t, int head) { return (size_t(seq) * s.heads + head) * n + t; };
  for (int seq = 0; seq < s.sequences; ++seq) {
    for (int head = 0; head < s.heads; ++head) {
      int v = head / s.group(), k = s.heads + v;
      in_parallel(n, [&, seq, head, k, v](int t) {
        std::vector<double> p(t + 1, -INFINITY);
        double top = -INFINITY, total = 0;
        for (int j = s.first(seq, t); j <= t; ++j) {
          p[j] = scale * dot_of(&qkv[row(seq, t, head)], &qkv[row(seq, j, k)], d);
          top = std::max(top, p[j]);
        }
        r.maxima[stat(seq, t, head)] = top;
        for (auto& x : p) total += x = std::exp(x - top);
        if (!s.sinks.empty()) total += std::exp(s.sinks[head] - top);
        r.lse[stat(seq, t, head)] = top + std::log(total);
        double* o = &r.o[out(seq, t, head)];
        const double* g = &d_o[out(seq, t, head)];
        for (int j = 0; j <= t; ++j) add_to(o, s.kept(seq, head, t, j) * p[j] / total, &qkv[value(seq, j, v)], e);
        double dot = delta[stat(seq, t, head)] = dot_of(o, g, e);
        for (int j = 0; j <= t; ++j) {
          double ds = p[j] / total * (s.kept(seq, head, t, j) * dot_of(g, &qkv[value(seq, j, v)], e) - dot);
          add_to(&r.dqkv[row(seq, t, head)], scale * ds, &qkv[row(seq, j, k)], d);
        }
      });
      for (int t = 0; t < n && !s.sinks.empty(); ++t) {
        r.dsinks[head] -= std::exp(s.sinks[head] - r.lse[stat(seq, t, head)]) * delta[stat(seq, t, head)];
      }
      in_parallel(n, [&, seq, head, k, v](int j) {
        for (int t = j; t < n; ++t) {
          const double* q = &qkv[row(seq, t, head)];
          const double* g = &d_o[out(seq, t, head)];
          if (j < s.first(seq, t)) continue;
          double p = std::exp(scale * dot_of(q, &qkv[row(seq, j, k)], d) - r.lse[stat(seq, t, head)]);
          double kept = s.kept(seq, head, t, j);
          double ds = p * (kept * dot_of(g, &qkv[value(seq, j, v)], e) - delta[stat(seq, t, head)]);
          add_to(&r.dqkv[row(seq, j, k)], scale * ds, q, d);
          add_to(&r.dqkv[value(seq, j, v)], kept * p, g, e);
        }
      });
    }
  }
  return r;
}

// Packed documents of uneven lengths: where each row's begins.
inline std::vector<uint32_t> some_documents(Random& r, int sequences, int sequence) {
  std::vector<uint32_t> starts;
  for (int i = 0; i < sequences; ++i) {
    uint32_t start = 0;
    for (int t = 0; t < sequence; ++t) {
      if (t > 0 && r.below(23) == 0) start = uint32_t(t);
      starts.push_back(start);
    }
  }
  return starts;
}

// The queries (0), keys (1) or values (2) of rows of qkv.
template <class T> std::vector<T> heads_of(const AttentionShape& s, const std::vector<T>& qkv, int which) {
  size_t keys = size_t(s.heads) * s.dim, values = keys + size_t(s.kv_heads) * s.dim;
  const size_t ends[] = {0, keys, values, s.width()};
  std::vector<T> part;
  for (size_t t = 0; t < s.tokens(); ++t) {
    auto at = qkv.begin() + t * s.width();
    part.insert(part.end(), at + ends[which], at + ends[which + 1]);
  }
  return part;
}

// Of a launch, in memory that kernels see.
struct AttentionTensors {
  Buffer<uint16_t> qkv, o, d_o, dqkv;
  Buffer<float> lse, delta, maxima;
  AttentionTensors(const AttentionShape& s, const std::vector<uint16_t>& qkv, const std::vector<uint16_t>& d_o)
      : qkv(qkv), o(s.o_len()), d_o(d_o), dqkv(s.qkv_len()), lse(s.lse_len()), delta(s.lse_len()), maxima(s.lse_len()) {}
};

// Checks what `forward` and `backward` of (shape, first sequence, sequences, tensors) write, and that sequences one by
// one have the same bits.
template <class Forward, class Backward>
void test_attention(const std::string& kind, const AttentionShape& s, uint64_t seed, Forward forward,
                    Backward backward) {
  Random random(seed * 1000 + s.sequence);
  // Scores with a deviation of about 2, so that maxima move and weights are uneven.
  auto qkv = random_values<uint16_t>(random, s.qkv_len(), 2.5), d_o = random_values<uint16_t>(random, s.o_len());
  auto expected = attention_reference(s, numbers_of(qkv), numbers_of(d_o));
  AttentionTensors t(s, qkv, d_o);
  forward(s, 0, s.sequences, t);
  backward(s, 0, s.sequences, t);
  std::string name = kind + " d" + std::to_string(s.dim) + "/" + std::to_string(s.values()) + " " +
                     std::to_string(s.sequences) + " x " +
                     std::to_string(s.sequence) + " heads " + std::to_string(s.heads) + "/" +
                     std::to_string(s.kv_heads) + " seed " + std::to_string(seed) + " ";
  auto dqkv = t.dqkv.read();
  check(name + "o", t.o.read(), expected.o, 4e-3);
  check(name + "lse", t.lse.read(), expected.lse, 1e-5);
  if (s.bounded()) check(name + "maxima", t.maxima.read(), expected.maxima, 1e-5);
  const char* names[] = {"dq", "dk", "dv"};
  for (int i = 0; i < 3; ++i) {
    // With one key there is nothing to choose: the gradients of scores are 0 but for what o lost when it was rounded.
    if (s.sequence == 1 && i < 2) continue;
    check(name + names[i], heads_of(s, dqkv, i), heads_of(s, expected.dqkv, i), 6e-3);
  }
  AttentionTensors alone(s, qkv, d_o);
  for (int i = 0; i < s.sequences; ++i) {
    forward(s, i, 1, alone);
    backward(s, i, 1, alone);
  }
  check_same(name + "o, sequences one by one", alone.o.read(), t.o.read());
  check_same(name + "lse, sequences one by one", alone.lse.read(), t.lse.read());
  check_same(name + "dqkv, sequences one by one", alone.dqkv.read(), dqkv);
}
