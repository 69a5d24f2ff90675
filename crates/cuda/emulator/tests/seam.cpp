// The seam itself: copies, matrix loads, products, warp exchanges and barriers mean the same in both worlds.
#include "../../kernels/device.h"
#include "../test.h"

extern "C" __global__ void product(const bf16* a, const bf16* b, const bf16* bt, float* c, float* ct) {
  SHARED(bf16, tile);
  int lane = (int)threadIdx.x;
  cp_async16(tile + lane * 8, a + lane * 8);  // 16 x 16
  cp_async_commit();
  if (lane < 16) cp_async16(tile + 256 + lane * 8, b + lane * 8);  // 8 x 16, by columns
  if (lane < 16) cp_async16(tile + 384 + lane * 8, bt + lane * 8);  // 16 x 8, by rows
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  uint32_t left[4], right[2];
  ldmatrix_x4(left, tile + (lane % 16) * 16 + lane / 16 * 8);
  ldmatrix_x2(right, tile + 256 + (lane % 8) * 16 + lane / 8 % 2 * 8);
  float sums[4] = {0, 0, 0, 0};
  mma_bf16(sums, left, right[0], right[1]);
  for (int i = 0; i < 4; ++i) c[(lane / 4 + (i / 2) * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
  ldmatrix_x2_trans(right, tile + 384 + (lane % 16) * 8);
  for (int i = 0; i < 4; ++i) sums[i] = 0;
  mma_bf16(sums, left, right[0], right[1]);
  for (int i = 0; i < 4; ++i) ct[(lane / 4 + (i / 2) * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

extern "C" __global__ void exchanges(int* out) {
  SHARED_ARRAY(int, values, 64);
  int i = (int)(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
  values[i] = i + (int)blockIdx.z * 100;
  __syncthreads();
  int other = values[63 - i];
  other += __shfl_xor_sync(~0u, i, 1) * 1000;
  other += __shfl_down_sync(~0u, i, 1) * 100000;
  other += __shfl_sync(~0u, i, 3) * 10000000;
  out[blockIdx.z * 64 + i] = other + (int)__popc(__ballot_sync(~0u, i % 2 == 0)) - 16;
}

static void products(uint64_t seed) {
  Random r(seed);
  auto a = random_values<uint16_t>(r, 256), b = random_values<uint16_t>(r, 128);
  std::vector<uint16_t> bt(128);
  std::vector<double> expected(128);
  for (int n = 0; n < 8; ++n) {
    for (int k = 0; k < 16; ++k) bt[k * 8 + n] = b[n * 16 + k];
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < 16; ++k) expected[m * 8 + n] += number(a[m * 16 + k]) * number(b[n * 16 + k]);
    }
  }
  Buffer<uint16_t> da(a), db(b), dbt(bt);
  Buffer<float> c(128), ct(128);
  LAUNCH(product, dim3(1), dim3(32), 1024, da.ptr(), db.ptr(), dbt.ptr(), c.ptr(), ct.ptr());
  check("product by columns", c.read(), expected, 1e-6);
  check("product by rows", ct.read(), expected, 1e-6);
}

int main() {
  for_seeds(5, products);
  for_seeds(5, [](uint64_t) {
    Buffer<int> out(128);
    LAUNCH(exchanges, dim3(1, 1, 2), dim3(4, 4, 4), 0, out.ptr());
    std::vector<double> expected;
    for (int i = 0; i < 128; ++i) {
      int t = i % 64, l = t % 32, w = t - l;
      expected.push_back(63 - t + i / 64 * 100 + (t ^ 1) * 1000.0 + (w + std::min(l + 1, 31)) * 100000.0 +
                         (w + 3) * 10000000.0);
    }
    check("exchanges", out.read(), expected, 0);
  });
  return finish();
}
