// Rates of gradients of weights on a device, by width of tile and number of units, each with the fold of its roots: a
// JSON object a line.
#pragma once
#include <algorithm>

struct BenchWeights {
  int leaf_rows;
  std::vector<int> leaves;
  std::vector<std::pair<int, int>> out_in;
};
static const BenchWeights BENCH[] = {
    {1024, {8}, {{2304, 768}, {768, 768}, {3072, 768}, {768, 3072}, {50304, 768}}},
    {4096, {1, 4}, {{2560, 2048}, {2048, 2048}, {11264, 2048}, {2048, 5632}, {32000, 2048}}},
    {256, {8}, {{1152, 384}, {384, 384}, {2048, 384}, {384, 1024}, {4096, 384}}},
};

__global__ void fill_noise(bf16* to, size_t count, uint32_t salt) {
  for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x) {
    uint32_t bits = (uint32_t(i) + salt) * 2654435761u;
    bits = (bits ^ bits >> 15) * 2246822519u;
    to[i] = f2bf(float(int(bits ^ bits >> 13)) * 0x1p-31f);
  }
}

// The median of 20 measurements, each of as many runs as make a launch's own cost small.
static double median_seconds(const std::function<void()>& run, double flop) {
  int runs = std::max(1, int(1e11 / flop));
  cudaEvent_t begin, end;
  must(cudaEventCreate(&begin), "event");
  must(cudaEventCreate(&end), "event");
  std::vector<double> seconds;
  for (int i = -3; i < 20; ++i) {
    must(cudaEventRecord(begin), "record");
    for (int j = 0; j < runs; ++j) run();
    must(cudaEventRecord(end), "record");
    must(cudaEventSynchronize(end), "run");
    float ms = 0;
    must(cudaEventElapsedTime(&ms, begin, end), "time");
    if (i >= 0) seconds.push_back(double(ms) * 1e-3 / runs);
  }
  must(cudaEventDestroy(begin), "event");
  must(cudaEventDestroy(end), "event");
  std::sort(seconds.begin(), seconds.end());
  return (seconds[9] + seconds[10]) / 2;
}

static int bench_leaves() {
  int processors = 0;
  must(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0), "attribute");
  for (const auto& weights : BENCH) {
    for (auto [out, in] : weights.out_in) {
      for (int leaves : weights.leaves) {
        Shape s{out, in, weights.leaf_rows};
        size_t rows = size_t(leaves) * size_t(s.leaf_rows);
        Buffer<bf16> dy(rows * size_t(out)), x(rows * size_t(in));
        Buffer<float> levels(s.len()), roots(s.len() * size_t(leaves));
        fill_noise<<<1024, 256>>>(dy, dy.size(), 1);
        fill_noise<<<1024, 256>>>(x, x.size(), 0x9e3779b9);
        must(cudaDeviceSynchronize(), "fill");
        double flop = 2.0 * double(rows) * double(out) * double(in);
        for (const auto& w : WIDTHS) {
          for (int units = 1; units <= leaves; units *= 2) {
            Tree below = {}, above = {};
            for (int n = leaves / units; n > 1; n /= 2) below.radices[below.depth++] = 2;
            for (int n = units; n > 1; n /= 2) above.radices[above.depth++] = 2;
            int blocks = blocks_of(w, s, units, processors);
            Buffer<float> held(held_len(w, blocks, below));
            auto product = leaves_job(w, s, dy, x, below, units, blocks, held,
                                      {units > 1 ? roots.ptr() : levels.ptr(), 0, 0, (long long)s.len()});
            auto fold = fold_job(roots, (long long)s.len(), s.len(), above, {levels, 0, 0});
            double seconds = median_seconds(
                [&] {
                  product();
                  if (units > 1) fold();
                },
                flop);
            std::printf(
                "{\"kernel\":\"%s\",\"m\":%d,\"n\":%d,\"k\":%zu,\"form\":\"dw\",\"leaves\":%d,\"units\":%d,"
                "\"seconds\":%.4g,\"tflops\":%.1f}\n",
                w.name, out, in, rows, leaves, units, seconds, flop / seconds * 1e-12);
            std::fflush(stdout);
          }
        }
      }
    }
  }
  return 0;
}
