// Attention on tensor cores, forward and derivative, and attention of a token over a cache.
#include "../../kernels/attention.cu"
#include "../../kernels/attention_grad.cu"
#include "attention_reference.h"

struct Kernels {
  int dim, value_dim;
  void (*forward)(const bf16*, bf16*, float*, int, int, int, float);
  void (*grad_keys)(const bf16*, const bf16*, const float*, const float*, bf16*, int, int, int, float);
  void (*grad_queries)(const bf16*, const bf16*, const float*, const float*, bf16*, int, int, int, float);
  void (*forward_seen)(const bf16*, bf16*, float*, int, int, int, float, Sight);
  void (*grad_keys_seen)(const bf16*, const bf16*, const float*, const float*, bf16*, int, int, int, float, Sight);
  void (*grad_queries_seen)(const bf16*, const bf16*, const float*, const float*, bf16*, int, int, int, float, Sight);
  int rows, threads, bytes;
  int keys, slices, keys_threads, keys_bytes, keys_seen_bytes;
  int queries, queries_threads, queries_bytes;
};
#define KERNELS(NAME, D, V)                                                                                     \
  Kernels {                                                                                                    \
    D, V, attention_fwd_bf16_##NAME, attention_bwd_dkv_bf16_##NAME, attention_bwd_dq_bf16_##NAME,              \
        attention_fwd_seen_bf16_##NAME, attention_bwd_dkv_seen_bf16_##NAME, attention_bwd_dq_seen_bf16_##NAME, \
        Forward<D, V>::ROWS, Forward<D, V>::THREADS, Forward<D, V>::BYTES, GradKeys<D, V>::KEYS,               \
        GradKeys<D, V>::SLICES, GradKeys<D, V>::THREADS, GradKeys<D, V>::BYTES, GradKeys<D, V>::SEEN_BYTES,    \
        GradQueries<D, V>::ROWS, GradQueries<D, V>::THREADS, GradQueries<D, V>::BYTES                          \
  }
static const Kernels ALL[] = {KERNELS(d16, 16, 16),    KERNELS(d32, 32, 32),       KERNELS(d64, 64, 64),
                              KERNELS(d80, 80, 80),    KERNELS(d96, 96, 96),       KERNELS(d128, 128, 128),
                              KERNELS(d256, 256, 256), KERNELS(d96v64, 96, 64), KERNELS(d192v128, 192, 128)};

// Shapes of a kernel's heads.
static AttentionShape shape_of(const Kernels& k, int sequences, int sequence, int heads, int kv_heads) {
  AttentionShape s{sequences, sequence, heads, kv_heads, k.dim};
  s.value_dim = k.value_dim;
  return s;
}

static unsigned blocks_of(int n, int size) { return unsigned((n + size - 1) / size); }

// What a test's shape says of keys, in memory that kernels see.
struct Bounds {
  Buffer<uint32_t> starts;
  Buffer<bf16> sinks;
  LeftOut left_out;
  explicit Bounds(const AttentionShape& s) : starts(s.starts), sinks(rounded(s.sinks)), left_out(s) {}
  Sight of(const AttentionShape& s, int from, const AttentionTensors& t) const {
    size_t token = size_t(from) * s.sequence;
    const uint32_t* documents = s.starts.empty() ? nullptr : starts + token;
    return {s.window, documents, s.sinks.empty() ? nullptr : sinks.ptr(), t.maxima + token * s.heads,
            left_out.of(s, from)};
  }
  static std::vector<bf16> rounded(const std::vector<double>& x) {
    std::vector<bf16> out;
    for (double v : x) out.push_back(host_f2bf(float(v)));
    return out;
  }
};

static void forward(const Kernels& k, const AttentionShape& s, int from, int sequences, const AttentionTensors& t) {
  size_t token = size_t(from) * s.sequence;
  const bf16* qkv = t.qkv + token * s.width();
  bf16* o = t.o + token * s.heads * s.values();
  float* lse = t.lse + token * s.heads;
  auto kernel = k.forward;
  dim3 grid(blocks_of(s.sequence, k.rows), unsigned(s.heads), unsigned(sequences));
  if (s.bounded()) {
    auto seen = k.forward_seen;
    Bounds bounds(s);
    Sight sight = bounds.of(s, from, t);
    size_t bytes = size_t(k.bytes + (s.cut > 0 ? 8 * k.rows : 0));
    LAUNCH(seen, grid, dim3(unsigned(k.threads)), bytes, qkv, o, lse, s.sequence, s.heads, s.kv_heads, s.scale(),
           sight);
    return;
  }
  LAUNCH(kernel, grid, dim3(unsigned(k.threads)), size_t(k.bytes), qkv, o, lse, s.sequence, s.heads, s.kv_heads,
         s.scale());
}

static void backward(const Kernels& k, const AttentionShape& s, int from, int sequences, const AttentionTensors& t) {
  size_t token = size_t(from) * s.sequence;
  const bf16* qkv = t.qkv + token * s.width();
  const bf16 *o = t.o + token * s.heads * s.values(), *d_o = t.d_o + token * s.heads * s.values();
  bf16* dqkv = t.dqkv + token * s.width();
  float *lse = t.lse + token * s.heads, *delta = t.delta + token * s.heads;
  int tokens = sequences * s.sequence;
  LAUNCH(attention_bwd_prep_bf16, dim3(blocks_of(tokens * s.heads, 32)), dim3(256), size_t(0), o, d_o, delta, tokens,
         s.sequence, s.heads, s.values());
  auto keys = k.grad_keys;
  dim3 grid(blocks_of(s.sequence, k.keys) * unsigned(k.slices), unsigned(s.kv_heads), unsigned(sequences));
  dim3 rows(blocks_of(s.sequence, k.queries), unsigned(s.heads), unsigned(sequences));
  if (s.bounded()) {
    auto keys_seen = k.grad_keys_seen;
    auto queries_seen = k.grad_queries_seen;
    Bounds bounds(s);
    Sight sight = bounds.of(s, from, t);
    size_t keys_bytes = size_t(k.keys_seen_bytes + (s.cut > 0 ? 2 * (k.keys_seen_bytes - k.keys_bytes) : 0));
    size_t queries_bytes = size_t(k.queries_bytes + (s.cut > 0 ? 8 * k.queries : 0));
    LAUNCH(keys_seen, grid, dim3(unsigned(k.keys_threads)), keys_bytes, qkv, d_o, lse, delta, dqkv, s.sequence, s.heads,
           s.kv_heads, s.scale(), sight);
    LAUNCH(queries_seen, rows, dim3(unsigned(k.queries_threads)), queries_bytes, qkv, d_o, lse, delta, dqkv, s.sequence,
           s.heads, s.kv_heads, s.scale(), sight);
    return;
  }
  LAUNCH(keys, grid, dim3(unsigned(k.keys_threads)), size_t(k.keys_bytes), qkv, d_o, lse, delta, dqkv, s.sequence,
         s.heads, s.kv_heads, s.scale());
  auto queries = k.grad_queries;
  LAUNCH(queries, rows, dim3(unsigned(k.queries_threads)), size_t(k.queries_bytes), qkv, d_o, lse, delta, dqkv,
         s.sequence, s.heads, s.kv_heads, s.scale());
}

static void test(const Kernels& k, int sequences, int sequence, int heads, int kv_heads, uint64_t seed) {
  AttentionShape s = shape_of(k, sequences, sequence, heads, kv_heads);
  test_attention(
      "attention", s, seed, [&](const auto&... a) { forward(k, a...); }, [&](const auto&... a) { backward(k, a...); });
}

// Windows, documents, sinks and dropout, alone and together; `far` is a window that reaches over several blocks of
// keys.
static void test_bounded(const Kernels& k, int sequences, int sequence, int heads, int kv_heads, int far, uint64_t seed) {
  Random random(seed + 77);
  auto starts = some_documents(random, sequences, sequence);
  std::vector<double> sinks;
  for (int h = 0; h < heads; ++h) sinks.push_back(host_bf2f(host_f2bf(float(2 * random.unit() + 1))));
  AttentionShape plain = shape_of(k, sequences, sequence, heads, kv_heads);
  for (int how = 0; how < 7; ++how) {
    AttentionShape s = plain;
    if (how == 0 || how == 3 || how == 6) s.window = how == 0 ? 5 : far;
    if (how == 1 || how == 3 || how == 6) s.starts = starts;
    if (how >= 2 && how != 5) s.sinks = sinks;
    if (how == 4) s.window = far;
    if (how >= 5) s.leave_some_out(random);
    test_attention(
        "attention within bounds " + std::to_string(how), s, seed, [&](const auto&... a) { forward(k, a...); },
        [&](const auto&... a) { backward(k, a...); });
  }
}

// Generates `length` tokens one after another: each must attend as the last query of a sequence does.
template <class T> static void test_decode(int length, int heads, int kv_heads, int dim, int window = 0) {
  AttentionShape s{1, length, heads, kv_heads, dim};
  Random random(uint64_t(length + dim));
  s.window = window;
  auto sinks = random_values<T>(random, window > 0 ? heads : 0, 2);
  s.sinks = numbers_of(sinks);
  Buffer<T> dsinks(sinks);
  Sight sight{window, nullptr, window > 0 ? dsinks.ptr() : nullptr, nullptr, NO_DROPS};
  auto qkv = random_values<T>(random, s.qkv_len(), 2.5);
  auto expected = attention_reference(s, numbers_of(qkv), std::vector<double>(s.o_len()));
  size_t cache_len = size_t(length) * kv_heads * dim;
  Buffer<T> in(qkv), keys(cache_len), values(cache_len), out(s.o_len());
  Buffer<int> at(std::vector<int>{0});
  for (int i = 0; i < length; ++i) {
    at.write({i});
    const T* token = in + size_t(i) * s.width();
    T *k = keys, *v = values, *o = out + size_t(i) * heads * dim;
    // Half of the positions as an argument, half from memory.
    const int* position = i % 2 == 0 ? at.ptr() : nullptr;
    if constexpr (sizeof(T) == 2) {
      LAUNCH(attention_decode_bf16, dim3(unsigned(heads)), dim3(256), size_t(0), token, k, v, o, position, i, heads,
             kv_heads, dim, s.scale(), sight);
    } else {
      LAUNCH(attention_decode_f32, dim3(unsigned(heads)), dim3(256), size_t(0), token, k, v, o, position, i, heads,
             kv_heads, dim, s.scale(), sight);
    }
  }
  std::string name = "decode " + std::string(sizeof(T) == 2 ? "bf16" : "f32") + " d" + std::to_string(dim) + " ";
  check(name + "o", out.read(), expected.o, tolerance<T>());
  check_same(name + "keys", keys.read(), heads_of(s, qkv, 1));
  check_same(name + "values", values.read(), heads_of(s, qkv, 2));
}

#ifdef PHALANX_ON_DEVICE
#include "attention_bench.h"

static void bench(int dim, int sequences, int sequence, int heads, int kv_heads) {
  const Kernels* k = ALL;
  while (k->dim != dim) ++k;
  AttentionShape s = shape_of(*k, sequences, sequence, heads, kv_heads);
  Random random(1);
  AttentionTensors t(s, random_values<bf16>(random, s.qkv_len()), random_values<bf16>(random, s.o_len()));
  std::string name = bench_name(s);
  bench_report(name + "forward", s, 2, [&] { forward(*k, s, 0, sequences, t); });
  bench_report(name + "backward", s, 5, [&] { backward(*k, s, 0, sequences, t); });
}
#endif

int main(int argc, char** argv) {
#ifdef PHALANX_ON_DEVICE
  if (argc > 1 && std::string(argv[1]) == "--bench") {
    bench(128, 4, 4096, 16, 16);
    bench(128, 1, 16384, 16, 16);
    bench(64, 4, 4096, 32, 32);
    bench(128, 4, 4096, 16, 4);
    return 0;
  }
  for (int d : {64, 128}) {
    for (const auto& k : ALL) {
      if (k.dim == d) test(k, 1, 4096, 2, 1, 1);
    }
  }
#endif
  if (argc > 1 && std::string(argv[1]) == "--shapes") {
    for (const auto& k : ALL) {
      std::printf("d%d, %d: forward %d rows, %d threads, %d bytes; dkv %d keys, %d slices, %d threads, %d bytes; dq %d rows, "
                  "%d threads, %d bytes\n",
                  k.dim, k.value_dim, k.rows, k.threads, k.bytes, k.keys, k.slices, k.keys_threads, k.keys_bytes, k.queries,
                  k.queries_threads, k.queries_bytes);
    }
    return 0;
  }
  for (const auto& k : ALL) {
    bool often = k.dim == 16 || k.dim == 64 || k.dim == 128 || k.dim == 192;
    for (int sequence : {1, 17, 64, 100, 160}) {
      if (!ON_DEVICE && !often && sequence != 100) continue;
      test(k, 2, sequence, 2, 1, 1);
    }
    if (often) {
      test(k, 1, 100, 1, 1, 2);
      test(k, 1, 130, 4, 1, 3);
    }
  }
  for_seeds(3, [](uint64_t seed) { test(ALL[0], 2, 160, 4, 2, 10 + seed); });
  for (const auto& k : ALL) {
    test_bounded(k, 2, 150, 2, 1, k.dim > 128 ? 40 : 70, 1);
    if (k.dim == 16) test_bounded(k, 1, 300, 4, 2, 130, 2), test_bounded(k, 1, 1, 2, 1, 3, 3);
  }
  if (ON_DEVICE) test_bounded(ALL[5], 2, 2000, 4, 2, 512, 1);
  test_decode<bf16>(40, 4, 2, 16, 7);
  test_decode<float>(70, 2, 1, 80, 40);
  test_decode<bf16>(40, 4, 2, 16);
  test_decode<float>(70, 2, 1, 80);
  test_decode<bf16>(5, 2, 2, 256);
  return finish();
}
