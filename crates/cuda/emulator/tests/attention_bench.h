// Times of attention on a device.
#pragma once
#include <algorithm>

inline std::string bench_name(const AttentionShape& s) {
  return "d" + std::to_string(s.dim) + " " + std::to_string(s.sequences) + " x " + std::to_string(s.sequence) +
         " heads " + std::to_string(s.heads) + "/" + std::to_string(s.kv_heads) + " ";
}

// The median of 20 runs; `products` of sequence x sequence x dim for each head count, half of which causality spares.
template <class Run> void bench_report(const std::string& name, const AttentionShape& s, int products, Run run) {
  cudaEvent_t start, stop;
  must(cudaEventCreate(&start), "event");
  must(cudaEventCreate(&stop), "event");
  std::vector<float> times;
  for (int i = 0; i < 22; ++i) {
    must(cudaEventRecord(start), "record");
    run();
    must(cudaEventRecord(stop), "record");
    must(cudaEventSynchronize(stop), "wait");
    float ms;
    must(cudaEventElapsedTime(&ms, start, stop), "time");
    if (i >= 2) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  double flop = 2.0 * products * s.sequences * s.heads * 0.5 * s.sequence * s.sequence * s.dim;
  std::printf("%s %.3f ms, %.0f TFLOP/s\n", name.c_str(), times[10], flop / times[10] * 1e-9);
}
