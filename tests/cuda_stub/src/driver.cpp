// libcuda: what a program asks the driver before it loads the runtime.
#include <cstddef>
#include <cstring>

#include "stub.h"

// Of libcudart.
EXPORT int cudaGetDeviceCount(int*);
EXPORT int cudaDeviceGetAttribute(int*, int, int);
EXPORT int cudaMemGetInfo(std::size_t*, std::size_t*);
EXPORT int cudaDriverGetVersion(int*);

EXPORT int cuInit(unsigned) {
  int count;
  return cudaGetDeviceCount(&count);  // CUDA_ERROR_NO_DEVICE has the runtime's number
}
EXPORT int cuDriverGetVersion(int* version) { return cudaDriverGetVersion(version); }
EXPORT int cuDeviceGetCount(int* count) { return cudaGetDeviceCount(count); }
EXPORT int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}
EXPORT int cuDeviceGetName(char* name, int length, int) {
  std::strncpy(name, "Stub device", static_cast<std::size_t>(length));
  return 0;
}
EXPORT int cuDeviceGetAttribute(int* value, int which, int device) {
  return cudaDeviceGetAttribute(value, which, device);  // the attributes have the runtime's numbers
}
EXPORT int cuMemGetInfo_v2(std::size_t* unused, std::size_t* total) { return cudaMemGetInfo(unused, total); }
EXPORT int cuDeviceTotalMem_v2(std::size_t* total, int) {
  std::size_t unused;
  return cudaMemGetInfo(&unused, total);
}
EXPORT int cuTensorMapEncodeTiled(...) { return 0; }
