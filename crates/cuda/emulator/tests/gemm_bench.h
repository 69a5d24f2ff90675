// Rates of products on a device, at the shapes of models.
#pragma once
#include <algorithm>

struct BenchShape {
  const char* name;
  int n, in, out, leaf_rows;
};
static const BenchShape BENCH[] = {
    {"square", 8192, 8192, 8192, 8192},
    {"llama qkv", 16384, 2048, 2560, 4096},
    {"llama attention out", 16384, 2048, 2048, 4096},
    {"llama gate up", 4096, 2048, 11264, 4096},
    {"llama gate up", 16384, 2048, 11264, 4096},
    {"llama down", 4096, 5632, 2048, 4096},
    {"llama down", 16384, 5632, 2048, 4096},
    {"llama logits", 4096, 2048, 32000, 4096},
    {"gpt2 qkv", 8192, 768, 2304, 1024},
    {"gpt2 qkv", 65536, 768, 2304, 1024},
    {"gpt2 attention out", 8192, 768, 768, 1024},
    {"gpt2 attention out", 65536, 768, 768, 1024},
    {"gpt2 up", 8192, 768, 3072, 1024},
    {"gpt2 up", 65536, 768, 3072, 1024},
    {"gpt2 down", 8192, 3072, 768, 1024},
    {"gpt2 down", 65536, 3072, 768, 1024},
    {"gpt2 logits", 8192, 768, 50304, 1024},
};

// The median time of a launch, in milliseconds, of 20 runs of as many launches as hide their own cost.
static double median_ms(const std::function<void()>& start, double flop) {
  int launches = std::max(1, int(2e11 / flop));
  cudaEvent_t begin, end;
  must(cudaEventCreate(&begin), "event");
  must(cudaEventCreate(&end), "event");
  std::vector<float> times;
  for (int i = 0; i < 22; ++i) {
    must(cudaEventRecord(begin), "record");
    for (int j = 0; j < launches; ++j) start();
    must(cudaEventRecord(end), "record");
    must(cudaEventSynchronize(end), "wait");
    float ms;
    must(cudaEventElapsedTime(&ms, begin, end), "time");
    if (i >= 2) times.push_back(ms / float(launches));
  }
  std::sort(times.begin(), times.end());
  return times[10];
}

// Random numbers, repeated, as many as `count`.
static void fill_random(bf16* to, size_t count, uint64_t seed) {
  Random random(seed);
  auto values = random_values<bf16>(random, 1 << 22);
  for (size_t at = 0; at < count; at += values.size()) {
    size_t some = std::min(values.size(), count - at);
    must(cudaMemcpy(to + at, at ? to : values.data(), some * sizeof(bf16), cudaMemcpyDefault), "fill");
  }
}

static int bench_gemm() {
  size_t tokens = 0, weights = 0;
  for (const auto& s : BENCH) {
    tokens = std::max(tokens, size_t(s.n) * size_t(std::max(s.in, s.out)));
    weights = std::max(weights, size_t(s.in) * s.out);
  }
  Buffer<bf16> first(tokens), second(tokens), weight(weights);
  fill_random(first, tokens, 1);
  fill_random(second, tokens, 2);
  fill_random(weight, weights, 3);
  Buffer<float> grad(size_t(64) << 22), held(size_t(6) * 132 * 128 * 256);
  for (const auto& s : BENCH) {
    double flop = 2.0 * s.n * s.in * s.out;
    std::printf("%-20s %6d x %5d x %5d  TFLOP/s by width 256 192 128:", s.name, s.n, s.in, s.out);
    for (int form = 0; form < 3; ++form) {
      std::printf("  %s", form == 0 ? "nt" : form == 1 ? "nn" : "tn");
      for (const auto& k : ALL) {
        std::function<void()> job;
        if (form < 2) {
          int cols = form == 0 ? s.out : s.in, inner = form == 0 ? s.in : s.out;
          job = rows_job(k, form == 0, first, weight, second, nullptr, nullptr, s.n, cols, inner, inner, cols);
        } else {
          // Leaves by twos; subtrees beside each other until there is work for all multiprocessors.
          int leaves = s.n / s.leaf_rows, subtrees = 1;
          int tiles = (s.out + 127) / 128 * ((s.in + k.width - 1) / k.width);
          while (subtrees < leaves && tiles * subtrees < 132) subtrees *= 2;
          Tree tree = {};
          for (int left = leaves / subtrees; left > 1; left /= 2) tree.radices[tree.depth++] = 2;
          long long len = (long long)s.out * s.in;
          job = leaves_job(k, second, first, grad, held, s.out, s.in, s.leaf_rows, tree, subtrees, len, 0, 0);
        }
        std::printf(" %4.0f", flop / median_ms(job, flop) * 1e-9);
        std::fflush(stdout);
      }
    }
    std::printf("\n");
  }
  return 0;
}
