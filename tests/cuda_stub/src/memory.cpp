// Memory and copies. Device memory is one file mapped twice: at the address that the program gets nothing can be
// touched, so that a host which reads or writes there crashes; the stub itself copies through the other, its shadow.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>

#include "runtime.h"

namespace stub {

struct Block {
  char* shadow;  // null for pinned host memory
  std::size_t size, mapped;
  int device;
};

using Blocks = std::map<const char*, Block>;  // by address

static Blocks& device_blocks() {
  static auto* made = new Blocks;
  return *made;
}
static Blocks& pinned_blocks() {
  static auto* made = new Blocks;
  return *made;
}
static std::size_t& in_use(int device) {
  static auto* made = new std::map<int, std::size_t>;
  return (*made)[device];
}

static Blocks::iterator find(Blocks& blocks, const void* address) {
  auto* place = static_cast<const char*>(address);
  auto next = blocks.upper_bound(place);
  if (next == blocks.begin()) return blocks.end();
  auto found = std::prev(next);
  return place < found->first + found->second.size ? found : blocks.end();
}

static int device_of(const void* address) {  // -1 for the host
  auto found = find(device_blocks(), address);
  return found == device_blocks().end() ? -1 : found->second.device;
}
static bool is_pinned(const void* address) { return find(pinned_blocks(), address) != pinned_blocks().end(); }

// Where the stub may touch what is at `address`.
static char* touchable(const void* address) {
  auto found = find(device_blocks(), address);
  auto* place = static_cast<char*>(const_cast<void*>(address));
  return found == device_blocks().end() ? place : found->second.shadow + (place - found->first);
}

static bool has_room(const void* address, std::size_t size) {
  auto found = find(device_blocks(), address);
  if (found == device_blocks().end()) return true;  // the host's memory is the host's business
  return static_cast<const char*>(address) + size <= found->first + found->second.size;
}

Error reachable(const char* call, const void* address, int device) {
  const int found = device_of(address);
  if (!address || found == device || is_pinned(address)) return kSuccess;
  return broken(call, kIllegalAddress, found < 0 ? "no memory of a device" : "memory of another device");
}

static Error allocate(const char* call, void** made, std::size_t size, int device) {
  *made = nullptr;
  if (!size) return kSuccess;
  if (in_use(device) + size > device_memory()) return broken(call, kOutOfMemory, "the device's memory is full");
  const std::size_t page = 4096, mapped = (size + page - 1) / page * page;
  const int file = memfd_create("device memory", 0);
  if (file < 0 || ftruncate(file, static_cast<off_t>(mapped))) return failed(kOutOfMemory);
  void* place = mmap(nullptr, mapped, PROT_NONE, MAP_SHARED, file, 0);
  void* shadow = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (place == MAP_FAILED || shadow == MAP_FAILED) return failed(kOutOfMemory);
  device_blocks()[static_cast<char*>(place)] = {static_cast<char*>(shadow), size, mapped, device};
  *made = place;
  in_use(device) += size;
  Line("malloc").with("call", std::string(call)).with("bytes", size).with("device", device)
      .with("in_use", in_use(device));
  return kSuccess;
}

static Error release(const char* call, void* address) {
  if (!address) return kSuccess;
  auto found = device_blocks().find(static_cast<char*>(address));
  if (found == device_blocks().end()) return broken(call, kInvalidValue, "no such memory");
  const Block block = found->second;
  device_blocks().erase(found);
  munmap(address, block.mapped);
  munmap(block.shadow, block.mapped);
  in_use(block.device) -= block.size;
  Line("free").with("call", std::string(call)).with("bytes", block.size).with("device", block.device)
      .with("in_use", in_use(block.device));
  return kSuccess;
}

static Error pin(const char* call, void* address, std::size_t size) {
  pinned_blocks()[static_cast<char*>(address)] = {nullptr, size, size, current_device()};
  Line("pin").with("call", std::string(call)).with("bytes", size).with("device", current_device());
  return kSuccess;
}

// What copies of 4 and of 8 bytes from the device deliver in place of its memory; 0 for the memory itself. Kernels that
// compute a size for the host compute nothing here, and most programs cannot go on with a size of 0.
static long long delivered_4 = 0, delivered_8 = 0;

struct Copy {
  void* target;
  const void* source;
  std::size_t target_pitch, source_pitch, width, height;

  void operator()() const {
    const bool to_host = device_of(source) >= 0 && device_of(target) < 0 && height == 1;
    if (to_host && width == 4 && delivered_4) {
      const auto value = static_cast<std::int32_t>(delivered_4);
      std::memcpy(target, &value, 4);
    } else if (to_host && width == 8 && delivered_8) {
      std::memcpy(target, &delivered_8, 8);
    } else {
      char* to = touchable(target);
      const char* from = touchable(source);
      for (std::size_t row = 0; row < height; ++row)
        std::memmove(to + row * target_pitch, from + row * source_pitch, width);
    }
  }
};

enum Direction { kHostToHost = 0, kHostToDevice = 1, kDeviceToHost = 2, kDeviceToDevice = 3, kDefault = 4 };
static const char* const kDirections[] = {"H2H", "H2D", "D2H", "D2D"};

// Pinned memory belongs to the host and is within the device's reach, so either name of it is right.
static bool may_be(const void* address, bool device) {
  return is_pinned(address) || (device_of(address) >= 0) == device;
}

static Error copy(const char* call, const Copy& wanted, int kind, void* handle, bool asynchronous) {
  Lock lock(mutex());
  Stream* stream;
  if (!wanted.width || !wanted.height) return kSuccess;
  if (!asynchronous)
    if (Error error = allowed_in_capture(call)) return error;
  if (Error error = admit(call, handle, false, &stream)) return error;
  const int source = device_of(wanted.source), target = device_of(wanted.target);
  const int found = (source >= 0 ? 2 : 0) + (target >= 0 ? 1 : 0);
  if (kind != kDefault && !(may_be(wanted.source, kind & 2) && may_be(wanted.target, kind & 1)))
    return broken(call, kInvalidValue, std::string("declared ") + kDirections[kind & 3] + ", is " + kDirections[found]);
  if (!has_room(wanted.source, (wanted.height - 1) * wanted.source_pitch + wanted.width) ||
      !has_room(wanted.target, (wanted.height - 1) * wanted.target_pitch + wanted.width))
    return broken(call, kInvalidValue, "past the end of the memory");
  const bool pageable = (source < 0 && !is_pinned(wanted.source)) || (target < 0 && !is_pinned(wanted.target));
  // An asynchronous copy to memory that the device cannot reach by itself returns when it is done.
  const bool waits = asynchronous ? (target < 0 && pageable) : found != kDeviceToDevice;
  {
    Line line("copy");
    placed(line, stream).with("call", std::string(call)).with("direction", std::string(kDirections[found]))
        .with("bytes", wanted.width * wanted.height).with("pageable", pageable).with("waits", waits)
        .with("source", source).with("target", target);
  }
  perform(stream, {"copy", wanted});
  return kSuccess;
}

static Error fill(const char* call, void* target, int value, std::size_t size, void* handle) {
  Lock lock(mutex());
  Stream* stream;
  if (Error error = admit(call, handle, false, &stream)) return error;
  if (!has_room(target, size)) return broken(call, kInvalidValue, "past the end of the memory");
  {
    Line line("fill");
    placed(line, stream).with("bytes", size);
  }
  perform(stream, {"fill", [=] { std::memset(touchable(target), value, size); }});
  return kSuccess;
}

struct PoolProperties {  // cudaMemPoolProps, as far as it is read
  int allocation_type, handle_types, location_type, location;
};
struct Pool {
  int device;
};

struct PointerAttributes {  // cudaPointerAttributes
  int type, device;
  const void *device_pointer, *host_pointer;
  long reserved[8];
};
static_assert(sizeof(PointerAttributes) == 88);

}  // namespace stub

using namespace stub;

EXPORT void stub_deliver(long long of_4_bytes, long long of_8_bytes) {
  Lock lock(mutex());
  delivered_4 = of_4_bytes;
  delivered_8 = of_8_bytes;
}

EXPORT Error cudaMalloc(void** made, std::size_t size) {
  Lock lock(mutex());
  if (Error error = allowed_in_capture("cudaMalloc")) return error;
  return allocate("cudaMalloc", made, size, current_device());
}
EXPORT Error cudaFree(void* address) {
  Lock lock(mutex());
  if (!address) return kSuccess;
  if (Error error = allowed_in_capture("cudaFree")) return error;
  return release("cudaFree", address);
}

// In the order of a stream, which is allowed in a capture. Done at once there too, not when the graph is launched.
EXPORT Error cudaMallocAsync(void** made, std::size_t size, void* stream) {
  Lock lock(mutex());
  Stream* found = find_stream(stream);
  if (!found) return broken("cudaMallocAsync", kInvalidHandle, "no such stream");
  return allocate("cudaMallocAsync", made, size, found->device);
}
EXPORT Error cudaMallocFromPoolAsync(void** made, std::size_t size, void* pool, void*) {
  Lock lock(mutex());
  return allocate("cudaMallocFromPoolAsync", made, size, static_cast<Pool*>(pool)->device);
}
EXPORT Error cudaFreeAsync(void* address, void*) {
  Lock lock(mutex());
  return release("cudaFreeAsync", address);
}
EXPORT Error cudaMemPoolCreate(void** made, const PoolProperties* properties) {
  *made = new Pool{properties->location};
  return kSuccess;
}
EXPORT Error cudaMemPoolDestroy(void* pool) {
  delete static_cast<Pool*>(pool);
  return kSuccess;
}
EXPORT Error cudaMemPoolGetAttribute(void*, int, void* value) {
  std::memset(value, 0, 4);  // some attributes are int, others 64 bits of which these are the lower half
  return kSuccess;
}
EXPORT Error cudaMemPoolSetAttribute(void*, int, void*) { return kSuccess; }
EXPORT Error cudaMemPoolTrimTo(void*, std::size_t) { return kSuccess; }

EXPORT Error cudaHostAlloc(void** made, std::size_t size, unsigned) {
  Lock lock(mutex());
  if (Error error = allowed_in_capture("cudaHostAlloc")) return error;
  *made = std::aligned_alloc(4096, (size + 4095) / 4096 * 4096);
  return *made ? pin("cudaHostAlloc", *made, size) : failed(kOutOfMemory);
}
EXPORT Error cudaMallocHost(void** made, std::size_t size) { return cudaHostAlloc(made, size, 0); }
EXPORT Error cudaFreeHost(void* address) {
  Lock lock(mutex());
  if (!address) return kSuccess;
  if (Error error = allowed_in_capture("cudaFreeHost")) return error;
  if (!pinned_blocks().erase(static_cast<char*>(address)))
    return broken("cudaFreeHost", kInvalidValue, "no such memory");
  std::free(address);
  return kSuccess;
}
EXPORT Error cudaHostRegister(void* address, std::size_t size, unsigned) {
  Lock lock(mutex());
  if (Error error = allowed_in_capture("cudaHostRegister")) return error;
  return pin("cudaHostRegister", address, size);
}
EXPORT Error cudaHostUnregister(void* address) {
  Lock lock(mutex());
  if (!pinned_blocks().erase(static_cast<char*>(address)))
    return broken("cudaHostUnregister", kInvalidValue, "no such memory");
  return kSuccess;
}

EXPORT Error cudaMemGetInfo(std::size_t* unused, std::size_t* total) {
  Lock lock(mutex());
  *total = device_memory();
  *unused = *total - in_use(current_device());
  return kSuccess;
}
EXPORT Error cudaPointerGetAttributes(PointerAttributes* found, const void* address) {
  Lock lock(mutex());
  *found = {};
  const int device = device_of(address);
  const bool pinned = is_pinned(address);
  found->type = device >= 0 ? 2 : pinned ? 1 : 0;  // cudaMemoryTypeDevice, Host, Unregistered
  found->device = device >= 0 ? device : pinned ? find(pinned_blocks(), address)->second.device : -2;
  found->device_pointer = device >= 0 || pinned ? address : nullptr;
  found->host_pointer = device >= 0 ? nullptr : address;
  return kSuccess;
}

EXPORT Error cudaMemcpy(void* target, const void* source, std::size_t size, int kind) {
  return copy("cudaMemcpy", {target, source, size, size, size, 1}, kind, nullptr, false);
}
EXPORT Error cudaMemcpyAsync(void* target, const void* source, std::size_t size, int kind, void* stream) {
  return copy("cudaMemcpyAsync", {target, source, size, size, size, 1}, kind, stream, true);
}
EXPORT Error cudaMemcpy2DAsync(void* target, std::size_t target_pitch, const void* source, std::size_t source_pitch,
                               std::size_t width, std::size_t height, int kind, void* stream) {
  return copy("cudaMemcpy2DAsync", {target, source, target_pitch, source_pitch, width, height}, kind, stream, true);
}
// A variable of a kernel's file, which has no memory here.
EXPORT Error cudaMemcpyFromSymbol(void* target, const void*, std::size_t size, std::size_t, int) {
  Lock lock(mutex());
  if (Error error = allowed_in_capture("cudaMemcpyFromSymbol")) return error;
  std::memset(touchable(target), 0, size);
  return kSuccess;
}

EXPORT Error cudaMemset(void* target, int value, std::size_t size) {
  Lock lock(mutex());
  if (Error error = allowed_in_capture("cudaMemset")) return error;
  return fill("cudaMemset", target, value, size, nullptr);
}
EXPORT Error cudaMemsetAsync(void* target, int value, std::size_t size, void* stream) {
  return fill("cudaMemsetAsync", target, value, size, stream);
}
