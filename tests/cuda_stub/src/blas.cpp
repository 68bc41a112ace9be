// libcublas: products of matrices, logged with their sizes and types.
#include "stub.h"

namespace {

struct Handle {
  void* stream = nullptr;
  int math = 0;  // cublasMath_t: 3 allows TF32 for float32
};

constexpr int kFloat32 = 0, kFloat64 = 1;  // cudaDataType_t

struct Operands {
  const void *a, *b, *c;
};

int product(Handle* handle, const char* function, int m, int n, int k, int batch, int type, int compute = -1,
            Operands known = {}) {
  const StubProduct found{function, m, n, k, batch, type, compute, handle->math, {known.a, known.b, known.c}};
  return stub_product(handle->stream, &found) ? 13 : 0;  // CUBLAS_STATUS_EXECUTION_FAILED
}

}  // namespace

EXPORT int cublasCreate_v2(Handle** made) {
  *made = new Handle;
  return 0;
}
EXPORT int cublasDestroy_v2(Handle* handle) {
  delete handle;
  return 0;
}
EXPORT int cublasSetStream_v2(Handle* handle, void* stream) {
  handle->stream = stream;
  return 0;
}
EXPORT int cublasSetMathMode(Handle* handle, int mode) {
  handle->math = mode;
  return 0;
}
EXPORT int cublasGetMathMode(Handle* handle, int* mode) {
  *mode = handle->math;
  return 0;
}
EXPORT const char* cublasGetStatusName(int status) {
  return status ? "CUBLAS_STATUS_EXECUTION_FAILED" : "CUBLAS_STATUS_SUCCESS";
}
EXPORT const char* cublasGetStatusString(int status) { return cublasGetStatusName(status); }

// The arguments before the sizes are the handle and the two transpositions, those after them the factors, and for each
// matrix its address, leading dimension and, by function, type and stride.
EXPORT int cublasSgemm_v2(Handle* handle, int, int, int m, int n, int k, const void*, const void* a, int, const void* b,
                          int, const void*, void* c, int) {
  return product(handle, "cublasSgemm", m, n, k, 1, kFloat32, -1, {a, b, c});
}
EXPORT int cublasDgemm_v2(Handle* handle, int, int, int m, int n, int k, const void*, const void* a, int, const void* b,
                          int, const void*, void* c, int) {
  return product(handle, "cublasDgemm", m, n, k, 1, kFloat64, -1, {a, b, c});
}
EXPORT int cublasGemmEx(Handle* handle, int, int, int m, int n, int k, const void*, const void* a, int, int,
                        const void* b, int, int, const void*, void* c, int type, int, int compute, int) {
  return product(handle, "cublasGemmEx", m, n, k, 1, type, compute, {a, b, c});
}
EXPORT int cublasSgemmStridedBatched(Handle* handle, int, int, int m, int n, int k, const void*, const void* a, int,
                                     long long, const void* b, int, long long, const void*, void* c, int, long long,
                                     int batch) {
  return product(handle, "cublasSgemmStridedBatched", m, n, k, batch, kFloat32, -1, {a, b, c});
}
EXPORT int cublasDgemmStridedBatched(Handle* handle, int, int, int m, int n, int k, const void*, const void* a, int,
                                     long long, const void* b, int, long long, const void*, void* c, int, long long,
                                     int batch) {
  return product(handle, "cublasDgemmStridedBatched", m, n, k, batch, kFloat64, -1, {a, b, c});
}
EXPORT int cublasGemmStridedBatchedEx(Handle* handle, int, int, int m, int n, int k, const void*, const void* a, int,
                                      int, long long, const void* b, int, int, long long, const void*, void* c,
                                      int type, int, long long, int batch, int compute, int) {
  return product(handle, "cublasGemmStridedBatchedEx", m, n, k, batch, type, compute, {a, b, c});
}

// A batch given as arrays of addresses on the device, which are not looked at.
EXPORT int cublasGemmBatchedEx(Handle* handle, int, int, int m, int n, int k, const void*, const void*, int, int,
                               const void*, int, int, const void*, void*, int type, int, int batch, int compute, int) {
  return product(handle, "cublasGemmBatchedEx", m, n, k, batch, type, compute);
}
EXPORT int cublasSgemmBatched(Handle* handle, int, int, int m, int n, int k, const void*, const void*, int, const void*,
                              int, const void*, void*, int, int batch) {
  return product(handle, "cublasSgemmBatched", m, n, k, batch, kFloat32);
}
EXPORT int cublasDgemmBatched(Handle* handle, int, int, int m, int n, int k, const void*, const void*, int, const void*,
                              int, const void*, void*, int, int batch) {
  return product(handle, "cublasDgemmBatched", m, n, k, batch, kFloat64);
}
EXPORT int cublasSgeam(Handle* handle, int, int, int m, int n, ...) {  // a transposition, as it is used
  return product(handle, "cublasSgeam", m, n, 0, 1, kFloat32);
}
EXPORT int cublasDgeam(Handle* handle, int, int, int m, int n, ...) {
  return product(handle, "cublasDgeam", m, n, 0, 1, kFloat64);
}
EXPORT int cublasScopy_v2(Handle* handle, int n, ...) { return product(handle, "cublasScopy", 1, n, 0, 1, kFloat32); }
EXPORT int cublasSscal_v2(Handle* handle, int n, ...) { return product(handle, "cublasSscal", 1, n, 0, 1, kFloat32); }

// Factorisations, for operators that no graph here has.
EXPORT int cublasSgetrfBatched(...) { return 15; }  // CUBLAS_STATUS_NOT_SUPPORTED
EXPORT int cublasDgetrfBatched(...) { return 15; }
EXPORT int cublasSgetriBatched(...) { return 15; }
EXPORT int cublasDgetriBatched(...) { return 15; }
