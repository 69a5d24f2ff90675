// Attention with the instructions of sm_90a.
#include "../../kernels/attention_grad.cu"
#include "../../kernels/attention_grad_wgmma.cu"
#include "../../kernels/attention_wgmma.cu"
#include "attention_reference.h"
#include "tensor_map.h"

struct Kernels {
  int dim;
  void (*forward)(const TensorMap, bf16*, float*, int, int, int, int, float);
  void (*grad_keys)(const TensorMap, const TensorMap, const float*, const float*, bf16*, int, int, int, int, float);
  void (*grad_queries)(const TensorMap, const TensorMap, const float*, const float*, bf16*, int, int, int, int, float);
  int rows, threads, bytes, grad_rows, grad_threads, keys_bytes, queries_bytes;
};
#define KERNELS(D)                                                                                                \
  Kernels {                                                                                                       \
    D, attention_fwd_wgmma_bf16_d##D, attention_bwd_dkv_wgmma_bf16_d##D, attention_bwd_dq_wgmma_bf16_d##D,         \
        ForwardWide<D>::ROWS, ForwardWide<D>::THREADS, ForwardWide<D>::BYTES, GradWide<D>::ROWS,                   \
        GradWide<D>::THREADS, GradWide<D>::KEYS_BYTES, GradWide<D>::BYTES                                          \
  }
static const Kernels ALL[] = {KERNELS(64), KERNELS(128)};

// Persistent blocks: as many as there are multiprocessors; few in the emulator, so that each takes several tiles.
static dim3 blocks_for(int sequence, int rows, int heads, int sequences) {
  int tiles = (sequence + rows - 1) / rows * heads * sequences, most = 3;
#ifdef PHALANX_ON_DEVICE
  must(cudaDeviceGetAttribute(&most, cudaDevAttrMultiProcessorCount, 0), "attribute");
#endif
  return dim3(unsigned(tiles < most ? tiles : most));
}

static TensorMap map_of(const bf16* at, const AttentionShape& s, int sequences, int heads) {
  return tensor_map_3d(at, heads * s.dim, s.sequence, sequences, 64);
}

static void forward(const Kernels& k, const AttentionShape& s, int from, int sequences, const AttentionTensors& t) {
  size_t token = size_t(from) * s.sequence;
  TensorMap qkv = map_of(t.qkv + token * s.width(), s, sequences, s.heads + 2 * s.kv_heads);
  bf16* o = t.o + token * s.heads * s.dim;
  float* lse = t.lse + token * s.heads;
  auto kernel = k.forward;
  LAUNCH(kernel, blocks_for(s.sequence, k.rows, s.heads, sequences), dim3(unsigned(k.threads)), size_t(k.bytes), qkv, o,
         lse, sequences, s.sequence, s.heads, s.kv_heads, s.scale());
}

static void backward(const Kernels& k, const AttentionShape& s, int from, int sequences, const AttentionTensors& t) {
  size_t token = size_t(from) * s.sequence;
  const bf16 *o = t.o + token * s.heads * s.dim, *d_o = t.d_o + token * s.heads * s.dim;
  bf16* dqkv = t.dqkv + token * s.width();
  float *lse = t.lse + token * s.heads, *delta = t.delta + token * s.heads;
  TensorMap qkv = map_of(t.qkv + token * s.width(), s, sequences, s.heads + 2 * s.kv_heads);
  TensorMap grads = map_of(d_o, s, sequences, s.heads);
  int tokens = sequences * s.sequence;
  LAUNCH(attention_bwd_prep_bf16, dim3(unsigned(tokens * s.heads + 31) / 32), dim3(256), size_t(0), o, d_o, delta,
         tokens, s.sequence, s.heads, s.dim);
  auto keys = k.grad_keys;
  LAUNCH(keys, blocks_for(s.sequence, k.grad_rows, s.kv_heads, sequences), dim3(unsigned(k.grad_threads)),
         size_t(k.keys_bytes), qkv, grads, lse, delta, dqkv, sequences, s.sequence, s.heads, s.kv_heads, s.scale());
  auto queries = k.grad_queries;
  LAUNCH(queries, blocks_for(s.sequence, k.grad_rows, s.heads, sequences), dim3(unsigned(k.grad_threads)),
         size_t(k.queries_bytes), qkv, grads, lse, delta, dqkv, sequences, s.sequence, s.heads, s.kv_heads, s.scale());
}

static void test(const Kernels& k, int sequences, int sequence, int heads, int kv_heads, uint64_t seed) {
  AttentionShape s{sequences, sequence, heads, kv_heads, k.dim};
  test_attention(
      "wgmma attention", s, seed, [&](const auto&... a) { forward(k, a...); },
      [&](const auto&... a) { backward(k, a...); });
}

#ifdef PHALANX_ON_DEVICE
#include "attention_bench.h"

static void bench(const Kernels& k, int sequences, int sequence, int heads, int kv_heads) {
  AttentionShape s{sequences, sequence, heads, kv_heads, k.dim};
  Random random(1);
  AttentionTensors t(s, random_values<bf16>(random, s.qkv_len()), random_values<bf16>(random, s.o_len()));
  std::string name = "wgmma " + bench_name(s);
  bench_report(name + "forward", s, 2, [&] { forward(k, s, 0, sequences, t); });
  bench_report(name + "backward", s, 5, [&] { backward(k, s, 0, sequences, t); });
}
#endif

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "--shapes") {
    for (const auto& k : ALL) {
      std::printf("d%d: forward %d rows, %d threads, %d bytes; derivative %d rows, %d threads, dkv %d bytes, dq %d bytes\n",
                  k.dim, k.rows, k.threads, k.bytes, k.grad_rows, k.grad_threads, k.keys_bytes, k.queries_bytes);
    }
    return 0;
  }
#ifdef PHALANX_ON_DEVICE
  if (argc > 1 && std::string(argv[1]) == "--bench") {
    bench(ALL[1], 4, 4096, 16, 16);
    bench(ALL[1], 1, 16384, 16, 16);
    bench(ALL[0], 4, 4096, 32, 32);
    bench(ALL[1], 4, 4096, 16, 4);
    return 0;
  }
  for (const auto& k : ALL) test(k, 1, 4096, 2, 1, 1);
#endif
  for (const auto& k : ALL) {
    for (int sequence : {1, 17, 64, 100, 160}) test(k, 2, sequence, 2, 1, 1);
    test(k, 1, 300, 4, 1, 2);
  }
  for_seeds(3, [](uint64_t seed) { test(ALL[0], 2, 260, 2, 2, 10 + seed); });
  return finish();
}
