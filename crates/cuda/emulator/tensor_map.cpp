// The stand-in driver's maps of tensors, checked as the driver checks them.
#include <cstring>

#include "driver.h"
#include "warpgroup.h"

using namespace driver;

namespace {
// Bytes of an element, by `CUtensorMapDataType`.
int element_bytes(int type) {
  constexpr int BYTES[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  return type >= 0 && type < int(std::size(BYTES)) ? BYTES[type] : 0;
}
}  // namespace

EXPORT int cuTensorMapEncodeTiled(void* out, int type, unsigned rank, void* base, const uint64_t* dims,
                                  const uint64_t* strides, const unsigned* box, const unsigned* element_strides,
                                  int interleave, int swizzle, int promotion, int out_of_bounds) {
  auto refuse = [](const char* why) { return wrong(INVALID_VALUE, "cuTensorMapEncodeTiled: %s", why); };
  int size = element_bytes(type);
  auto address = reinterpret_cast<uint64_t>(base);
  if (reinterpret_cast<uintptr_t>(out) % 64) return refuse("a map that is not aligned to 64 bytes");
  if (!size || rank < 1 || rank > 5 || promotion < 0 || promotion > 3) return refuse("a type, rank or promotion");
  if (interleave != 0 || swizzle < 0 || swizzle > 3) return refuse("an interleave or swizzle that is not emulated");
  if (address % 16) return refuse("an address that is not aligned to 16 bytes");
  cpu::MapFields map = {};
  map.base = address;
  uint64_t extent = uint64_t(size);
  for (unsigned i = 0; i < rank; ++i) {
    if (dims[i] == 0 || dims[i] > uint64_t(1) << 32) return refuse("a dim of 0 or above 2^32");
    if (box[i] == 0 || box[i] > 256) return refuse("a box of 0 or above 256");
    if (element_strides[i] == 0 || element_strides[i] > 8) return refuse("a stride of elements above 8");
    uint64_t stride = i == 0 ? uint64_t(size) : strides[i - 1];
    if (i > 0) {
      if (stride % 16 || stride >= uint64_t(1) << 40) return refuse("a stride that is no multiple of 16 bytes, or too large");
      map.strides[i - 1] = stride;
    }
    map.dims[i] = dims[i];
    map.box[i] = uint16_t(box[i]);
    map.element_strides[i] = uint8_t(element_strides[i]);
    extent += (dims[i] - 1) * stride;
  }
  unsigned row = box[0] * unsigned(size), span[] = {~0u, 32, 64, 128};
  if (row % 16) return refuse("a box whose rows are no multiple of 16 bytes");
  if (row > span[swizzle]) return refuse("a box whose rows are wider than the swizzle");
  if (!on_card(address, extent)) return refuse("a tensor that does not lie in a live allocation");
  map.type = uint8_t(type);
  map.rank = uint8_t(rank);
  map.swizzle = uint8_t(swizzle);
  map.interleave = uint8_t(interleave);
  map.out_of_bounds = uint8_t(out_of_bounds);
  std::memcpy(out, &map, sizeof map);
  return SUCCESS;
}
