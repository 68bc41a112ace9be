// What the stub's libraries share. Only C types cross their borders, so that no CUDA header is needed to build them.
#pragma once

#define EXPORT extern "C" __attribute__((visibility("default")))

// Of libcudart: writes a mark that begins a phase into the log.
EXPORT void stub_mark(const char* name);

// Of libcudart: a matrix product, convolution or the like, as libcublas and its kin begin it on a stream (null for the
// default stream). `type` and `compute` are CUDA's numbers, -1 where the call has none. `operands` are the matrices, as
// far as they are known by one address each; they must be where the stream's device can reach them, in each replay too.
// Returns a cudaError_t.
struct StubProduct {
  const char* function;
  long long m, n, k, batch;
  int type, compute, math;
  const void* operands[3];
};
EXPORT int stub_product(void* stream, const StubProduct* product);
