// Attention in true float32, forward and derivative.
#include "../../kernels/attention_f32.cu"
#include "attention_reference.h"

struct Tensors {
  Buffer<float> qkv, o, d_o, dqkv, lse, delta, maxima, sinks;
  Buffer<uint32_t> starts;
  LeftOut left_out;
  Tensors(const AttentionShape& s, const std::vector<float>& qkv, const std::vector<float>& d_o)
      : qkv(qkv), o(s.o_len()), d_o(d_o), dqkv(s.qkv_len()), lse(s.lse_len()), delta(s.lse_len()),
        maxima(s.lse_len()), sinks(std::vector<float>(s.sinks.begin(), s.sinks.end())), starts(s.starts), left_out(s) {}
};

static void run(const AttentionShape& s, int from, int sequences, const Tensors& t) {
  size_t token = size_t(from) * s.sequence;
  const float *qkv = t.qkv + token * s.width(), *d_o = t.d_o + token * s.heads * s.values();
  float *o = t.o + token * s.heads * s.values(), *dqkv = t.dqkv + token * s.width();
  float *lse = t.lse + token * s.heads, *delta = t.delta + token * s.heads;
  Sight sight{s.window, s.starts.empty() ? nullptr : t.starts + token, s.sinks.empty() ? nullptr : t.sinks.ptr(),
              t.maxima + token * s.heads, t.left_out.of(s, from)};
  unsigned blocks = unsigned(s.sequence + 31) / 32;
  size_t row = 32 * size_t(s.dim + 1), value_row = 32 * size_t(s.values() + 1);
  dim3 queries(blocks, unsigned(s.heads), unsigned(sequences)), keys(blocks, unsigned(s.kv_heads), unsigned(sequences));
  LAUNCH(attention_fwd_f32, queries, dim3(256), 4 * (2 * row + value_row + 32 * 33), qkv, o, lse, s.sequence, s.heads, s.kv_heads,
         s.dim, s.values(), s.scale(), sight);
  int tokens = sequences * s.sequence;
  LAUNCH(attention_bwd_prep_f32, dim3(unsigned(tokens * s.heads + 31) / 32), dim3(256), size_t(0), o, d_o, delta, tokens,
         s.sequence, s.heads, s.values());
  size_t bytes = 4 * (2 * row + 2 * value_row + 64 * 33);
  LAUNCH(attention_bwd_dkv_f32, keys, dim3(256), bytes, qkv, d_o, lse, delta, dqkv, s.sequence, s.heads, s.kv_heads,
         s.dim, s.values(), s.scale(), sight);
  LAUNCH(attention_bwd_dq_f32, queries, dim3(256), bytes, qkv, d_o, lse, delta, dqkv, s.sequence, s.heads, s.kv_heads,
         s.dim, s.values(), s.scale(), sight);
}

static void test(int dim, int sequences, int sequence, int heads, int kv_heads, uint64_t seed, int window = 0,
                 bool documents = false, bool sinks = false, int value_dim = 0, bool dropout = false) {
  AttentionShape s{sequences, sequence, heads, kv_heads, dim};
  Random bounds(seed);
  s.window = window;
  s.value_dim = value_dim;
  if (documents) s.starts = some_documents(bounds, sequences, sequence);
  for (int h = 0; sinks && h < heads; ++h) s.sinks.push_back(float(2 * bounds.unit() + 1));
  if (dropout) s.leave_some_out(bounds);
  Random random(seed * 1000 + sequence);
  auto qkv = random_values<float>(random, s.qkv_len(), 2.5), d_o = random_values<float>(random, s.o_len());
  auto expected = attention_reference(s, numbers_of(qkv), numbers_of(d_o));
  Tensors t(s, qkv, d_o), alone(s, qkv, d_o);
  run(s, 0, sequences, t);
  for (int i = 0; i < sequences; ++i) run(s, i, 1, alone);
  std::string name = "attention f32 d" + std::to_string(dim) + "/" + std::to_string(s.values()) + " " +
                     std::to_string(sequences) + " x " +
                     std::to_string(sequence) + " heads " + std::to_string(heads) + "/" + std::to_string(kv_heads) + " ";
  auto dqkv = t.dqkv.read();
  check(name + "o", t.o.read(), expected.o, 2e-6);
  check(name + "lse", t.lse.read(), expected.lse, 1e-6);
  check(name + "maxima", t.maxima.read(), expected.maxima, 1e-6);
  const char* names[] = {"dq", "dk", "dv"};
  for (int i = 0; i < 3; ++i) {
    if (sequence == 1 && i < 2) continue;  // 0 but for rounding
    check(name + names[i], heads_of(s, dqkv, i), heads_of(s, expected.dqkv, i), 2e-6);
  }
  check_same(name + "o, sequences one by one", alone.o.read(), t.o.read());
  check_same(name + "lse, sequences one by one", alone.lse.read(), t.lse.read());
  check_same(name + "dqkv, sequences one by one", alone.dqkv.read(), dqkv);
}

int main() {
  for (int dim : {16, 64, 80, 128}) {
    for (int sequence : {1, 17, 64, 100}) test(dim, 2, sequence, 2, 1, 1);
  }
  test(256, 1, 40, 2, 2, 1);
  for_seeds(3, [](uint64_t seed) { test(16, 2, 70, 4, 2, 10 + seed); });
  for (int dim : {16, 80}) {
    test(dim, 2, 100, 2, 1, 1, 5);
    test(dim, 2, 100, 4, 2, 2, 0, true);
    test(dim, 1, 100, 2, 1, 3, 0, false, true);
    test(dim, 2, 130, 2, 1, 4, 40, true, true);
    test(dim, 2, 100, 4, 2, 5, 0, false, false, 0, true);
    test(dim, 2, 130, 2, 1, 6, 40, true, true, dim / 2, true);
  }
  test(12, 2, 50, 2, 2, 5, 0, false, false, 6);
  test(192, 1, 70, 2, 1, 6, 40, true, true, 128);
  if (ON_DEVICE) test(64, 2, 1500, 4, 2, 1);
  return finish();
}
