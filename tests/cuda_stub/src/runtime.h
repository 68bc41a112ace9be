// The state behind libcudart's functions: devices, streams, captures, memory and the log.
//
// Functions have the names and the binary interface of CUDA 13; the structures that callers hand in are declared here
// as far as they are used. Every exported function takes the one lock, since programs call from many threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "stub.h"

namespace stub {

enum Error : int {  // the values of cudaError_t
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kInvalidHandle = 400,
  kIllegalState = 401,
  kIllegalAddress = 700,
  kCaptureUnsupported = 900,
  kCaptureInvalidated = 901,
  kCaptureUnmatched = 903,
  kCaptureIsolation = 905,
  kCaptureImplicit = 906,
  kCapturedEvent = 907,
};

struct Dim3 {
  unsigned x, y, z;
};

using Lock = std::lock_guard<std::recursive_mutex>;
std::recursive_mutex& mutex();

// One line of the log: a kind, then tab-separated key=value. It is written when the object goes.
class Line {
 public:
  explicit Line(const char* kind) : text_(kind) {}
  Line(const Line&) = delete;
  ~Line();
  Line& with(const char* key, const std::string& value);
  template <class Number, class = std::enable_if_t<std::is_integral_v<Number>>>
  Line& with(const char* key, Number value) {
    return with(key, std::to_string(value));
  }

 private:
  std::string text_;
};

// Devices. The current one is the calling thread's, as in CUDA.
int device_count();
int current_device();
std::size_t device_memory();  // bytes that each has

// Keeps `error` for cudaGetLastError and returns it; `broken` also writes into the log which rule the call broke.
Error failed(Error error);
Error broken(const char* call, Error error, const std::string& rule);

// Streams and captures.
struct Capture;
struct Stream {
  int id;  // 0 is the default stream of its device
  int device;
  bool blocking;  // ordered with the default stream
  Capture* capture = nullptr;
};

// The stream behind a handle: null and the two special handles (cudaStreamLegacy, cudaStreamPerThread) are all the
// default stream of the current device.
// nullptr for a handle that was never made or is destroyed.
Stream* find_stream(void* handle);

// What a stream is given to do. A capture keeps `effect` for the replays.
struct Step {
  const char* kind;  // kernel, product, copy, fill or host
  std::function<void()> effect;
};

// Whether `call` may give work to `handle` now: the stream must exist and the capture rules must allow it. What
// `launches` something needs a stream of the current device; a copy does not.
Error admit(const char* call, void* handle, bool launches, Stream** stream);
void perform(Stream* stream, Step step);

// kSuccess, or the error of a call that no thread (or not this one) may make while a stream is being captured.
Error allowed_in_capture(const char* call);

// kSuccess if a kernel on the device can reach the address (or there is none): its own memory or pinned host memory.
Error reachable(const char* call, const void* address, int device);

// `line` with the place where work goes: stream, device and whether it is being captured.
Line& placed(Line& line, const Stream* stream);

}  // namespace stub
