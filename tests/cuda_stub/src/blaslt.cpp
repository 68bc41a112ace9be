// libcublasLt: products whose matrices are described by objects of their own.
#include <cstdint>
#include <cstring>

#include "stub.h"

namespace {

struct Layout {
  int type;
  std::uint64_t rows, columns;
  int batch = 1;
};
struct Description {
  int compute;
};
struct Heuristic {  // cublasLtMatmulHeuristicResult_t
  std::uint64_t algorithm[8], workspace;
  int state;
  float waves;
  int reserved[4];
};
static_assert(sizeof(Heuristic) == 96);

struct Empty {};  // an object whose content is never asked for

int create(Empty** made) {
  *made = new Empty;
  return 0;
}
int destroy(Empty* object) {
  delete object;
  return 0;
}

struct Matrix {
  const void* place;
  const Layout* layout;
};

int product(const char* function, Matrix a, Matrix b, Matrix d, int compute, void* stream) {
  const auto m = static_cast<long long>(d.layout->rows), n = static_cast<long long>(d.layout->columns);
  const auto k = m ? static_cast<long long>(a.layout->rows * a.layout->columns) / m : 0;  // A transposed or not
  const StubProduct found{function, m,  n, k, d.layout->batch, d.layout->type, compute,
                          -1,       {a.place, b.place, d.place}};
  return stub_product(stream, &found) ? 13 : 0;  // CUBLAS_STATUS_EXECUTION_FAILED
}

}  // namespace

EXPORT int cublasLtCreate(Empty** made) { return create(made); }
EXPORT int cublasLtDestroy(Empty* handle) { return destroy(handle); }

EXPORT int cublasLtMatmulDescCreate(Description** made, int compute, int) {
  *made = new Description{compute};
  return 0;
}
EXPORT int cublasLtMatmulDescDestroy(Description* description) {
  delete description;
  return 0;
}
EXPORT int cublasLtMatmulDescSetAttribute(...) { return 0; }

EXPORT int cublasLtMatrixLayoutCreate(Layout** made, int type, std::uint64_t rows, std::uint64_t columns,
                                      std::int64_t) {
  *made = new Layout{type, rows, columns};
  return 0;
}
EXPORT int cublasLtMatrixLayoutDestroy(Layout* layout) {
  delete layout;
  return 0;
}
EXPORT int cublasLtMatrixLayoutSetAttribute(Layout* layout, int attribute, const void* value, std::size_t) {
  if (attribute == 5) std::memcpy(&layout->batch, value, sizeof layout->batch);  // CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT
  return 0;
}

EXPORT int cublasLtMatmulPreferenceCreate(Empty** made) { return create(made); }
EXPORT int cublasLtMatmulPreferenceDestroy(Empty* preference) { return destroy(preference); }
EXPORT int cublasLtMatmulPreferenceSetAttribute(...) { return 0; }
EXPORT int cublasLtMatmulAlgoInit(...) { return 0; }
EXPORT int cublasLtMatmulAlgoConfigSetAttribute(...) { return 0; }
EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, Heuristic* results,
                                          int* count) {
  std::memset(results, 0, sizeof *results);
  *count = 1;
  return 0;
}
EXPORT int cublasLtMatmul(void*, const Description* description, const void*, const void* a, const Layout* a_layout,
                          const void* b, const Layout* b_layout, const void*, const void*, const Layout*, void* d,
                          const Layout* d_layout, const void*, void*, std::size_t, void* stream) {
  return product("cublasLtMatmul", {a, a_layout}, {b, b_layout}, {d, d_layout}, description->compute, stream);
}

EXPORT int cublasLtMatrixTransformDescCreate(Empty** made, int) { return create(made); }
EXPORT int cublasLtMatrixTransformDescDestroy(Empty* description) { return destroy(description); }
EXPORT int cublasLtMatrixTransform(void*, void*, const void*, const void* a, const Layout* a_layout, const void*,
                                   const void* b, const Layout* b_layout, void* c, const Layout* c_layout,
                                   void* stream) {
  return product("cublasLtMatrixTransform", {a, a_layout}, {b, b_layout}, {c, c_layout}, -1, stream);
}
