// Maps of bf16 tensors for tests: 128-byte swizzle, and 0 outside.
#pragma once
#ifdef PHALANX_ON_DEVICE
#include <cuda.h>
#endif

// Of [z, y, x] elements in order, in boxes of box_z x box_y x box_x.
inline TensorMap tensor_map_3d(const uint16_t* at, int x, int y, int z, int box_x, int box_y, int box_z) {
  TensorMap map;
#ifdef PHALANX_ON_DEVICE
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  must(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result), "find");
  cuuint64_t dims[] = {cuuint64_t(x), cuuint64_t(y), cuuint64_t(z)};
  cuuint64_t strides[] = {cuuint64_t(x) * 2, cuuint64_t(x) * cuuint64_t(y) * 2};
  cuuint32_t box[] = {cuuint32_t(box_x), cuuint32_t(box_y), cuuint32_t(box_z)}, steps[] = {1, 1, 1};
  auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  CUresult encoded = encode(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void*)at, dims,
                            strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
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
  const uint64_t dims[] = {uint64_t(x), uint64_t(y), uint64_t(z)};
  const int box[] = {box_x, box_y, box_z};
  for (int i = 0; i < 3; ++i) fields.dims[i] = dims[i], fields.box[i] = uint16_t(box[i]);
  fields.strides[0] = uint64_t(x) * 2;
  fields.strides[1] = uint64_t(x) * uint64_t(y) * 2;
  std::memcpy(&map, &fields, sizeof map);
#endif
  return map;
}
