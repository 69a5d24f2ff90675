// A stand-in for libcublasLt.so.13: plain sums in the order of the inner dim, f32, rounded once.
//
// With PHALANX_EMULATED_FAULT=no-algorithm it has none. A product of more than 2^34 multiplications is not computed: its
// result is NaN (nobody waits for it but those who measure a card's speed).
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "stream.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {
enum Status : int { SUCCESS = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
enum DataType : int { R_32F = 0, R_16BF = 14 };
enum Epilogue : unsigned { DEFAULT = 1, BIAS = 4 };
constexpr uint64_t ALGORITHM = 0x7068616c616e7831;
constexpr double MOST_PRODUCTS = double(1L << 34);

Status wrong(Status status, const std::string& what) {
  std::fprintf(stderr, "emulated cuBLASLt: %s\n", what.c_str());
  return status;
}

// Attributes by number, each with the bytes that it was given.
struct Attribute {
  int what;
  void* at;
  size_t bytes;
};
int set(const std::vector<Attribute>& known, int what, const void* from, size_t bytes) {
  for (auto& a : known) {
    if (a.what != what) continue;
    if (bytes != a.bytes || !from) return wrong(INVALID_VALUE, "attribute " + std::to_string(what) + " of " + std::to_string(bytes) + " bytes");
    std::memcpy(a.at, from, bytes);
    return SUCCESS;
  }
  return wrong(NOT_SUPPORTED, "attribute " + std::to_string(what));
}
int get(const std::vector<Attribute>& known, int what, void* to, size_t bytes, size_t* written) {
  for (auto& a : known) {
    if (a.what != what) continue;
    if (written) *written = a.bytes;
    if (bytes == 0) return SUCCESS;
    if (bytes < a.bytes || !to) return INVALID_VALUE;
    std::memcpy(to, a.at, a.bytes);
    return SUCCESS;
  }
  return NOT_SUPPORTED;
}

struct Handle {};

struct Layout {
  int type, order = 0, batches = 1;
  uint64_t rows, cols;
  int64_t stride, batch_stride = 0;
  std::vector<Attribute> attributes() {
    return {{0, &type, 4}, {1, &order, 4}, {2, &rows, 8}, {3, &cols, 8}, {4, &stride, 8}, {5, &batches, 4}, {6, &batch_stride, 8}};
  }
  size_t bytes() const { return type == R_32F ? 4 : 2; }
  size_t extent() const {
    if (rows == 0 || cols == 0) return 0;
    return (size_t(batch_stride) * size_t(batches - 1) + size_t(stride) * (cols - 1) + rows) * bytes();
  }
  bool sane() const {
    return (type == R_32F || type == R_16BF) && order == 0 && batches >= 1 && stride >= int64_t(rows) && batch_stride >= 0;
  }
};

struct Product {
  int compute, scale, pointer_mode = 0, left_op = 0, right_op = 0, acc_op = 0, fill = 0, bias_type = -1, sm_count = 0;
  unsigned epilogue = DEFAULT;
  const void* bias = nullptr;
  int64_t bias_stride = 0;
  signed char fast = 0;
  std::vector<Attribute> attributes() {
    return {{0, &compute, 4}, {1, &scale, 4}, {2, &pointer_mode, 4}, {3, &left_op, 4}, {4, &right_op, 4}, {5, &acc_op, 4},
            {6, &fill, 4}, {7, &epilogue, 4}, {8, &bias, 8}, {10, &bias_stride, 8}, {15, &sm_count, 4}, {25, &fast, 1},
            {26, &bias_type, 4}};
  }
};

struct Preference {
  unsigned search = 0, reduction = ~0u, alignments[4] = {256, 256, 256, 256};
  float waves = 0;
  size_t workspace = 0;
  uint64_t kinds = ~uint64_t(0);
  std::vector<Attribute> attributes() {
    return {{0, &search, 4}, {1, &workspace, 8}, {3, &reduction, 4}, {5, &alignments[0], 4}, {6, &alignments[1], 4},
            {7, &alignments[2], 4}, {8, &alignments[3], 4}, {9, &waves, 4}, {12, &kinds, 8}};
  }
};

struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  int status;
  float waves;
  int reserved[4];
};

float load(const void* from, size_t i, int type) {
  if (type == R_32F) return static_cast<const float*>(from)[i];
  uint32_t bits = uint32_t(static_cast<const uint16_t*>(from)[i]) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
void store(void* to, size_t i, int type, float x) {
  if (type == R_32F) {
    static_cast<float*>(to)[i] = x;
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  static_cast<uint16_t*>(to)[i] = uint16_t(nan ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A whole product, kept by value: a recording outlives its descriptors.
struct Call {
  Product product;
  Layout left, right, acc, result;
  const void *a, *b, *c;
  void* d;
  float alpha, beta;
  size_t inner;

  bool alive() const {
    bool bias = product.epilogue != BIAS || phalanx_emulator_on_card(product.bias, result.rows * bias_bytes());
    return bias && phalanx_emulator_on_card(a, left.extent()) && phalanx_emulator_on_card(b, right.extent()) &&
           (beta == 0 || phalanx_emulator_on_card(c, acc.extent())) && phalanx_emulator_on_card(d, result.extent());
  }
  int bias_type() const { return product.bias_type < 0 ? result.type : product.bias_type; }
  size_t bias_bytes() const { return bias_type() == R_32F ? 4 : 2; }

  int run() const {
    if (!alive()) {
      wrong(EXECUTION_FAILED, "an operand lies in no live allocation");
      return 700;  // CUDA_ERROR_ILLEGAL_ADDRESS
    }
    for (size_t batch = 0; batch < size_t(result.batches); ++batch) run(batch);
    return 0;
  }
  void run(size_t batch) const {
    size_t m = result.rows, n = result.cols;
    auto base = [&](const Layout& l) { return l.batches > 1 ? size_t(l.batch_stride) * batch : 0; };
    size_t a0 = base(left), b0 = base(right), c0 = base(acc), d0 = base(result);
    bool skip = double(m) * double(n) * double(inner) > MOST_PRODUCTS;
    // The left factor as [inner][m], so that the innermost loop goes along memory.
    std::vector<float> packed(skip ? 0 : inner * m), column(m, skip ? NAN : 0.0f);
    for (size_t k = 0; !skip && k < inner; ++k) {
      for (size_t i = 0; i < m; ++i) {
        packed[k * m + i] = load(a, a0 + (product.left_op ? i * size_t(left.stride) + k : k * size_t(left.stride) + i), left.type);
      }
    }
    for (size_t j = 0; j < n; ++j) {
      if (!skip) {
        std::fill(column.begin(), column.end(), 0.0f);
        for (size_t k = 0; k < inner; ++k) {
          float y = load(b, b0 + (product.right_op ? k * size_t(right.stride) + j : j * size_t(right.stride) + k), right.type);
          add(column.data(), &packed[k * m], y, m);
        }
      }
      for (size_t i = 0; i < m; ++i) {
        float x = alpha * column[i];
        if (beta != 0) x += beta * load(c, c0 + j * size_t(acc.stride) + i, acc.type);
        if (product.epilogue == BIAS) x += load(product.bias, i, bias_type());
        store(d, d0 + j * size_t(result.stride) + i, result.type, x);
      }
    }
  }
  __attribute__((optimize("O3"))) static void add(float* __restrict__ to, const float* __restrict__ x, float y, size_t n) {
    for (size_t i = 0; i < n; ++i) to[i] += x[i] * y;
  }
};

// Whether the shapes fit, and which inner dim they have.
Status fit(const Product& p, const Layout& a, const Layout& b, const Layout& c, const Layout& d, size_t& inner) {
  for (auto* l : {&a, &b, &c, &d}) {
    if (!l->sane()) return wrong(INVALID_VALUE, "a layout that makes no sense, or is not in columns");
    if (l->batches != d.batches && l->batches != 1) return wrong(INVALID_VALUE, "batches that do not fit");
  }
  if (p.left_op < 0 || p.left_op > 1 || p.right_op < 0 || p.right_op > 1 || p.acc_op != 0) return NOT_SUPPORTED;
  if (p.epilogue != DEFAULT && p.epilogue != BIAS) return wrong(NOT_SUPPORTED, "an epilogue other than a bias");
  if (p.compute != 68 && p.compute != 69) return wrong(NOT_SUPPORTED, "computes in f32 alone");
  if (p.scale != R_32F || p.pointer_mode != 0) return wrong(NOT_SUPPORTED, "scalars are f32 of the host");
  inner = p.left_op ? a.rows : a.cols;
  size_t m = p.left_op ? a.cols : a.rows, n = p.right_op ? b.rows : b.cols, other = p.right_op ? b.cols : b.rows;
  if (other != inner || m != d.rows || n != d.cols || c.rows != m || c.cols != n) {
    char text[160];
    std::snprintf(text, sizeof text, "[%zu, %zu] times [%zu, %zu] into [%llu, %llu]", m, inner, other, n,
                  (unsigned long long)d.rows, (unsigned long long)d.cols);
    return wrong(INVALID_VALUE, text);
  }
  if (a.type != b.type || c.type != d.type) return NOT_SUPPORTED;
  return SUCCESS;
}
}  // namespace

EXPORT int cublasLtCreate(Handle** out) {
  *out = new Handle;
  return SUCCESS;
}
EXPORT int cublasLtDestroy(Handle* handle) {
  delete handle;
  return SUCCESS;
}
EXPORT size_t cublasLtGetVersion() { return 130100; }
EXPORT size_t cublasLtGetCudartVersion() { return 13000; }

EXPORT const char* cublasLtGetStatusName(int status) {
  switch (status) {
    case SUCCESS: return "CUBLAS_STATUS_SUCCESS";
    case NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
    case EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
    case NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
    default: return "CUBLAS_STATUS unknown";
  }
}
EXPORT const char* cublasLtGetStatusString(int status) { return cublasLtGetStatusName(status); }

EXPORT int cublasLtMatmulDescCreate(Product** out, int compute, int scale) {
  *out = new Product{compute, scale};
  return SUCCESS;
}
EXPORT int cublasLtMatmulDescDestroy(Product* product) {
  delete product;
  return SUCCESS;
}
EXPORT int cublasLtMatmulDescSetAttribute(Product* p, int what, const void* from, size_t bytes) {
  return set(p->attributes(), what, from, bytes);
}
EXPORT int cublasLtMatmulDescGetAttribute(Product* p, int what, void* to, size_t bytes, size_t* written) {
  return get(p->attributes(), what, to, bytes, written);
}

EXPORT int cublasLtMatrixLayoutCreate(Layout** out, int type, uint64_t rows, uint64_t cols, int64_t stride) {
  auto* layout = new Layout;
  layout->type = type;
  layout->rows = rows;
  layout->cols = cols;
  layout->stride = stride;
  *out = layout;
  return SUCCESS;
}
EXPORT int cublasLtMatrixLayoutDestroy(Layout* layout) {
  delete layout;
  return SUCCESS;
}
EXPORT int cublasLtMatrixLayoutSetAttribute(Layout* l, int what, const void* from, size_t bytes) {
  return set(l->attributes(), what, from, bytes);
}
EXPORT int cublasLtMatrixLayoutGetAttribute(Layout* l, int what, void* to, size_t bytes, size_t* written) {
  return get(l->attributes(), what, to, bytes, written);
}

EXPORT int cublasLtMatmulPreferenceCreate(Preference** out) {
  *out = new Preference;
  return SUCCESS;
}
EXPORT int cublasLtMatmulPreferenceDestroy(Preference* preference) {
  delete preference;
  return SUCCESS;
}
EXPORT int cublasLtMatmulPreferenceSetAttribute(Preference* p, int what, const void* from, size_t bytes) {
  return set(p->attributes(), what, from, bytes);
}
EXPORT int cublasLtMatmulPreferenceGetAttribute(Preference* p, int what, void* to, size_t bytes, size_t* written) {
  return get(p->attributes(), what, to, bytes, written);
}

EXPORT int cublasLtMatmulAlgoGetHeuristic(Handle* handle, Product* p, Layout* a, Layout* b, Layout* c, Layout* d,
                                          Preference* preference, int wanted, Heuristic results[], int* found) {
  *found = 0;
  if (!handle || !preference || wanted < 1) return INVALID_VALUE;
  size_t inner;
  if (Status status = fit(*p, *a, *b, *c, *d, inner)) return status;
  const char* fault = std::getenv("PHALANX_EMULATED_FAULT");
  if (fault && std::strcmp(fault, "no-algorithm") == 0) return NOT_SUPPORTED;
  results[0] = {};
  results[0].algorithm.data[0] = ALGORITHM;
  results[0].status = SUCCESS;
  results[0].waves = 1;
  *found = 1;
  return SUCCESS;
}

EXPORT int cublasLtMatmulAlgoCheck(Handle*, Product* p, Layout* a, Layout* b, Layout* c, Layout* d,
                                   const Algorithm* algorithm, Heuristic* result) {
  size_t inner;
  if (Status status = fit(*p, *a, *b, *c, *d, inner)) return status;
  if (algorithm->data[0] != ALGORITHM) return INVALID_VALUE;
  *result = {*algorithm, 0, SUCCESS, 1, {}};
  return SUCCESS;
}

// Identity, tile, parts of the inner dim and so on: all are 0 but for one part.
EXPORT int cublasLtMatmulAlgoConfigGetAttribute(const Algorithm* algorithm, int what, void* to, size_t bytes,
                                                size_t* written) {
  if (algorithm->data[0] != ALGORITHM) return INVALID_VALUE;
  int value = what == 2 ? 1 : 0;
  size_t size = what == 7 || what == 8 ? 2 : 4;
  if (what < 0 || what > 8 || (bytes > 0 && bytes < size)) return INVALID_VALUE;
  if (bytes > 0) std::memcpy(to, &value, size);
  if (written) *written = size;
  return SUCCESS;
}

EXPORT int cublasLtMatmul(Handle* handle, Product* p, const float* alpha, const void* a, Layout* left, const void* b,
                          Layout* right, const float* beta, const void* c, Layout* acc, void* d, Layout* result,
                          const Algorithm* algorithm, void* workspace, size_t workspace_bytes, void* stream) {
  if (!handle || !p || !alpha || !beta) return INVALID_VALUE;
  Call call{*p, *left, *right, *acc, *result, a, b, c, d, *alpha, *beta, 0};
  if (Status status = fit(*p, *left, *right, *acc, *result, call.inner)) return status;
  if (algorithm && algorithm->data[0] != ALGORITHM) return wrong(INVALID_VALUE, "an algorithm that is none");
  if (c == d && *beta != 0 && (acc->stride != result->stride || acc->type != result->type)) return INVALID_VALUE;
  if (!call.alive()) return wrong(INVALID_VALUE, "an operand lies in no live allocation");
  if (workspace_bytes > 0 && (reinterpret_cast<uintptr_t>(workspace) % 16 || !phalanx_emulator_on_card(workspace, workspace_bytes))) {
    return wrong(INVALID_VALUE, "the work space lies in no live allocation, or is not aligned to 16 bytes");
  }
  std::function<int()> work = [call] { return call.run(); };
  return phalanx_emulator_enqueue(stream, &work, 0) ? EXECUTION_FAILED : SUCCESS;
}
