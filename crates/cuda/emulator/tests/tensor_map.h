// Maps of bf16 tensors for tests: 128-byte swizzle, and 0 outside.
#pragma once
#include <array>
#ifdef PHALANX_ON_DEVICE
#include <cuda.h>
#endif

// In boxes of box_rows x 64; strides are bytes, of all dims but the first.
inline TensorMap tensor_map(const uint16_t* at, std::array<int, 3> dims, std::array<long long, 2> strides, int box_rows) {
  TensorMap map;
#ifdef PHALANX_ON_DEVICE
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  must(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result), "find");
  cuuint64_t extents[] = {cuuint64_t(dims[0]), cuuint64_t(dims[1]), cuuint64_t(dims[2])};
  cuuint64_t steps[] = {cuuint64_t(strides[0]), cuuint64_t(strides[1])};
  cuuint32_t box[] = {64, cuuint32_t(box_rows), 1}, every[] = {1, 1, 1};
  auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  CUresult encoded = encode(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void*)at, extents,
                            steps, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (encoded != CUDA_SUCCESS) {
    std::printf("cuTensorMapEncodeTiled: %d\n", int(encoded));
    std::exit(99);
  }
#else
  cpu::MapFields fields = {};
  fields.base = reinterpret_cast<uint64_t>(at);
  fields.rank = 3;
  fields.swizzle = 3;
  for (size_t i = 0; i < 3; ++i) fields.dims[i] = uint64_t(dims[i]);
  for (size_t i = 0; i < 2; ++i) fields.strides[i] = uint64_t(strides[i]);
  fields.box[0] = 64, fields.box[1] = uint16_t(box_rows), fields.box[2] = 1;
  std::memcpy(&map, &fields, sizeof map);
#endif
  return map;
}

// Of [z, y, x] elements in order.
inline TensorMap tensor_map_3d(const uint16_t* at, int x, int y, int z, int box_rows) {
  return tensor_map(at, {x, y, z}, {2ll * x, 2ll * x * y}, box_rows);
}
