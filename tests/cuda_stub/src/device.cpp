// Devices, their properties, and errors. CUDA_STUB_DEVICES says how many there are (1 by default), CUDA_STUB_MEMORY
// how many bytes each has (80 GiB by default). They look like an H100, so that kernels for it are chosen.
#include <cstdlib>
#include <cstring>

#include "runtime.h"

namespace stub {

static long long setting(const char* name, long long otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atoll(text) : otherwise;
}

int device_count() {
  static const int count = static_cast<int>(setting("CUDA_STUB_DEVICES", 1));
  return count;
}

std::size_t device_memory() {
  static const long long bytes = setting("CUDA_STUB_MEMORY", 80ll << 30);
  return static_cast<std::size_t>(bytes);
}

static thread_local int current = 0;
static thread_local Error last_error = kSuccess;

int current_device() { return current; }

Error failed(Error error) {
  if (error != kSuccess) last_error = error;
  return error;
}

Error broken(const char* call, Error error, const std::string& rule) {
  Line("violation").with("call", std::string(call)).with("error", int(error)).with("rule", rule);
  return failed(error);
}

// cudaDeviceProp of CUDA 13, field by field in its order; those that are never set stand together as `unused`.
struct Properties {
  char name[256];
  char uuid[16], luid[8];
  unsigned luid_node_mask;
  std::size_t total_memory, shared_memory_per_block;
  int registers_per_block, warp_size;
  std::size_t pitch;
  int threads_per_block, block_size[3], grid_size[3];
  std::size_t constant_memory;
  int major, minor;
  std::size_t texture_alignment, texture_pitch_alignment;
  int multiprocessors, integrated, maps_host_memory;
  int unused_texture_sizes[39];
  std::size_t surface_alignment;
  int concurrent_kernels, ecc, pci_bus, pci_device, pci_domain, tcc;
  int copy_engines, unified_addressing, memory_bus_bits, l2_cache_bytes, persisting_l2_bytes;
  int threads_per_multiprocessor, stream_priorities, global_l1, local_l1;
  std::size_t shared_memory_per_multiprocessor;
  int registers_per_multiprocessor, managed_memory, multi_gpu_board, multi_gpu_board_group;
  int unused_host_access[5];
  int cooperative_launch;
  std::size_t shared_memory_per_block_optin;
  int unused_page_tables[2];
  int blocks_per_multiprocessor, access_policy_window;
  std::size_t reserved_shared_memory_per_block;
  int unused_registration[4];
  int memory_pools;
  int unused_rdma[6];
  int cluster_launch;
  int unused_tail[64];
};
static_assert(offsetof(Properties, major) == 360 && offsetof(Properties, multiprocessors) == 384);
static_assert(offsetof(Properties, l2_cache_bytes) == 596 && offsetof(Properties, cluster_launch) == 748);
static_assert(offsetof(Properties, shared_memory_per_block_optin) == 672 && sizeof(Properties) == 1008);

static Properties properties(int device) {
  Properties p;
  std::memset(&p, 0, sizeof p);
  std::strcpy(p.name, "Stub device");
  p.uuid[0] = static_cast<char>(device + 1);
  p.pci_bus = device + 1;
  p.total_memory = device_memory();
  p.shared_memory_per_block = 48 << 10;
  p.registers_per_block = p.registers_per_multiprocessor = 64 << 10;
  p.warp_size = 32;
  p.pitch = 0x7fffffff;
  p.threads_per_block = p.block_size[0] = p.block_size[1] = 1024;
  p.block_size[2] = 64;
  p.grid_size[0] = 0x7fffffff;
  p.grid_size[1] = p.grid_size[2] = 65535;
  p.constant_memory = 64 << 10;
  p.major = 9;
  p.texture_alignment = p.surface_alignment = 512;
  p.texture_pitch_alignment = 32;
  p.multiprocessors = 132;
  p.maps_host_memory = p.concurrent_kernels = p.unified_addressing = p.stream_priorities = 1;
  p.copy_engines = 3;
  p.memory_bus_bits = 5120;
  p.l2_cache_bytes = 50 << 20;
  p.threads_per_multiprocessor = 2048;
  p.shared_memory_per_multiprocessor = 228 << 10;
  p.shared_memory_per_block_optin = 227 << 10;
  p.reserved_shared_memory_per_block = 1 << 10;
  p.blocks_per_multiprocessor = 32;
  p.managed_memory = p.cooperative_launch = p.memory_pools = p.cluster_launch = 1;
  return p;
}

static int attribute(int which, const Properties& p) {
  switch (which) {  // the values of cudaDeviceAttr
    case 1: return p.threads_per_block;
    case 2: case 3: case 4: return p.block_size[which - 2];
    case 5: case 6: case 7: return p.grid_size[which - 5];
    case 8: return static_cast<int>(p.shared_memory_per_block);
    case 10: return p.warp_size;
    case 12: return p.registers_per_block;
    case 13: return 1980000;  // clock in kHz
    case 16: return p.multiprocessors;
    case 37: return p.memory_bus_bits;
    case 38: return p.l2_cache_bytes;
    case 39: return p.threads_per_multiprocessor;
    case 75: return p.major;
    case 76: return p.minor;
    case 81: return static_cast<int>(p.shared_memory_per_multiprocessor);
    case 82: return p.registers_per_multiprocessor;
    case 97: return static_cast<int>(p.shared_memory_per_block_optin);
    case 106: return p.blocks_per_multiprocessor;
    default: return 1;  // most of the others ask whether a feature is there
  }
}

static bool exists(int device) { return device >= 0 && device < device_count(); }

static const char* name_of(int error) {
  switch (error) {
    case kSuccess: return "cudaSuccess";
    case kInvalidValue: return "cudaErrorInvalidValue";
    case kOutOfMemory: return "cudaErrorMemoryAllocation";
    case kNoDevice: return "cudaErrorNoDevice";
    case kInvalidDevice: return "cudaErrorInvalidDevice";
    case kInvalidHandle: return "cudaErrorInvalidResourceHandle";
    case kIllegalState: return "cudaErrorIllegalState";
    case kIllegalAddress: return "cudaErrorIllegalAddress";
    case kCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case kCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    case kCaptureUnmatched: return "cudaErrorStreamCaptureUnmatched";
    case kCaptureIsolation: return "cudaErrorStreamCaptureIsolation";
    case kCaptureImplicit: return "cudaErrorStreamCaptureImplicit";
    case kCapturedEvent: return "cudaErrorCapturedEvent";
    default: return "cudaErrorUnknown";
  }
}

}  // namespace stub

using namespace stub;

EXPORT Error cudaGetDeviceCount(int* count) {
  *count = device_count();
  return *count ? kSuccess : failed(kNoDevice);
}
EXPORT Error cudaGetDevice(int* device) {
  *device = current;
  return kSuccess;
}
EXPORT Error cudaSetDevice(int device) {
  if (!exists(device)) return failed(kInvalidDevice);
  current = device;
  return kSuccess;
}
EXPORT Error cudaGetDeviceProperties(Properties* found, int device) {
  if (!exists(device)) return failed(kInvalidDevice);
  *found = properties(device);
  return kSuccess;
}
EXPORT Error cudaDeviceGetAttribute(int* value, int which, int device) {
  if (!exists(device)) return failed(kInvalidDevice);
  *value = attribute(which, properties(device));
  return kSuccess;
}

EXPORT Error cudaDriverGetVersion(int* version) {
  *version = 13000;
  return kSuccess;
}
EXPORT Error cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

// Asked for cuTensorMapEncodeTiled, which describes a tensor to a kernel; no kernel here looks at it.
EXPORT Error cudaGetDriverEntryPointByVersion(const char*, void** found, unsigned, unsigned long long, int* result) {
  *found = reinterpret_cast<void*>(+[] { return 0; });
  if (result) *result = 0;
  return kSuccess;
}

EXPORT Error cudaGetLastError() {
  const Error error = last_error;
  last_error = kSuccess;
  return error;
}
EXPORT Error cudaPeekAtLastError() { return last_error; }
EXPORT const char* cudaGetErrorName(int error) { return name_of(error); }
EXPORT const char* cudaGetErrorString(int error) { return name_of(error); }
