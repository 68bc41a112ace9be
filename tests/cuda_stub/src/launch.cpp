// Kernels and products: nothing runs, but the log says what would have, and where.
#include <cxxabi.h>

#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "runtime.h"

namespace stub {

// Kernels are known by the address of their host function, or of what cudaLibraryGetKernel gave.
static std::unordered_map<const void*, std::string>& kernel_names() {
  static auto* made = new std::unordered_map<const void*, std::string>;
  return *made;
}

static std::string demangled(const std::string& name) {
  int status;
  char* found = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  std::string result = found ? found : name;
  std::free(found);
  return result;
}

static std::string name_of(const void* kernel) {
  auto found = kernel_names().find(kernel);
  return found == kernel_names().end() ? "unknown" : demangled(found->second);
}

static std::string text(Dim3 size) {
  return std::to_string(size.x) + "," + std::to_string(size.y) + "," + std::to_string(size.z);
}

static Error launch(const char* call, const void* kernel, Dim3 grid, Dim3 block, void* handle) {
  Lock lock(mutex());
  Stream* stream;
  if (Error error = admit(call, handle, true, &stream)) return error;
  Line line("kernel");
  placed(line, stream).with("grid", text(grid)).with("block", text(block)).with("name", name_of(kernel));
  perform(stream, {"kernel", nullptr});
  return kSuccess;
}

struct Configuration {
  Dim3 grid, block;
  std::size_t shared_memory;
  void* stream;
};
static thread_local std::vector<Configuration> configurations;  // of <<<...>>> whose kernel is still to be called

struct LaunchConfig {  // cudaLaunchConfig_t
  Dim3 grid, block;
  std::size_t shared_memory;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};
static_assert(sizeof(LaunchConfig) == 56);

struct FunctionAttributes {  // cudaFuncAttributes
  std::size_t shared_bytes, constant_bytes, local_bytes;
  int threads_per_block, registers, ptx_version, binary_version, cache_mode, dynamic_shared_bytes;
  int unused[23];
};
static_assert(sizeof(FunctionAttributes) == 144);

}  // namespace stub

using namespace stub;

// What compiled kernels register when their library is loaded.
EXPORT void** __cudaRegisterFatBinary(void*) { return static_cast<void**>(std::calloc(1, 64)); }
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void** binary) { std::free(binary); }
EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, std::size_t, int, int) {}
EXPORT void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*,
                                   int*) {
  Lock lock(mutex());
  kernel_names()[host] = name;
}

EXPORT unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, std::size_t shared_memory, void* stream) {
  configurations.push_back({grid, block, shared_memory, stream});
  return 0;
}
EXPORT Error __cudaPopCallConfiguration(Dim3* grid, Dim3* block, std::size_t* shared_memory, void** stream) {
  if (configurations.empty()) return failed(kInvalidValue);
  const Configuration found = configurations.back();
  configurations.pop_back();
  *grid = found.grid;
  *block = found.block;
  *shared_memory = found.shared_memory;
  *stream = found.stream;
  return kSuccess;
}

EXPORT Error __cudaGetKernel(const void** kernel, const void* function) {
  *kernel = function;
  return kSuccess;
}
EXPORT Error __cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 block, void**, std::size_t, void* stream) {
  return launch("cudaLaunchKernel", kernel, grid, block, stream);
}
EXPORT Error cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 block, void**, std::size_t, void* stream) {
  return launch("cudaLaunchKernel", kernel, grid, block, stream);
}
EXPORT Error cudaLaunchCooperativeKernel(const void* kernel, Dim3 grid, Dim3 block, void**, std::size_t,
                                         void* stream) {
  return launch("cudaLaunchCooperativeKernel", kernel, grid, block, stream);
}
EXPORT Error cudaLaunchKernelExC(const LaunchConfig* config, const void* kernel, void**) {
  return launch("cudaLaunchKernelExC", kernel, config->grid, config->block, config->stream);
}
EXPORT Error cudaLaunchHostFunc(void* handle, void (*function)(void*), void* data) {
  Lock lock(mutex());
  Stream* stream;
  if (Error error = admit("cudaLaunchHostFunc", handle, false, &stream)) return error;
  {
    Line line("host");
    placed(line, stream);
  }
  perform(stream, {"host", [=] { function(data); }});
  return kSuccess;
}

EXPORT int stub_product(void* handle, const StubProduct* product) {
  Lock lock(mutex());
  Stream* stream;
  if (Error error = admit(product->function, handle, true, &stream)) return error;
  auto check = [product = *product, device = stream->device] {
    for (const void* operand : product.operands)
      if (Error error = reachable(product.function, operand, device)) return error;
    return kSuccess;
  };
  if (Error error = check()) return error;
  Line line("product");
  placed(line, stream).with("function", std::string(product->function))
      .with("m", product->m).with("n", product->n).with("k", product->k).with("batch", product->batch)
      .with("type", product->type).with("compute", product->compute).with("math", product->math);
  perform(stream, {"product", check});
  return kSuccess;
}

// Kernels that come as binaries of their own.
EXPORT Error cudaLibraryLoadData(void** library, const void*, void*, void**, unsigned, void*, void**, unsigned) {
  *library = std::malloc(1);
  return kSuccess;
}
EXPORT Error cudaLibraryUnload(void* library) {
  std::free(library);
  return kSuccess;
}
EXPORT Error cudaLibraryGetKernel(void** kernel, void*, const char* name) {
  Lock lock(mutex());
  *kernel = strdup(name);  // kept: kernels are known by address
  kernel_names()[*kernel] = name;
  return kSuccess;
}
EXPORT Error cudaKernelSetAttributeForDevice(void*, int, int, int) { return kSuccess; }

EXPORT Error cudaFuncSetAttribute(const void*, int, int) { return kSuccess; }
EXPORT Error cudaFuncGetAttributes(FunctionAttributes* found, const void*) {
  *found = {};
  found->threads_per_block = 1024;
  found->registers = 32;
  found->ptx_version = found->binary_version = 90;
  found->dynamic_shared_bytes = 227 << 10;
  return kSuccess;
}
EXPORT Error cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, std::size_t,
                                                                    unsigned) {
  *blocks = 2;
  return kSuccess;
}
