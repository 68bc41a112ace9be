// libcudnn: the provider looks these functions up by name when the library is there. Descriptors carry nothing; calls
// that would compute are logged as products of no size.
#include <cstddef>

#include "stub.h"

namespace {

struct Handle {
  void* stream = nullptr;
};
struct Empty {};

int compute(Handle* handle, const char* function) {
  const StubProduct product{function, 0, 0, 0, 0, -1, -1, -1, {}};
  return stub_product(handle->stream, &product) ? 5000 : 0;  // CUDNN_STATUS_EXECUTION_FAILED
}

}  // namespace

EXPORT std::size_t cudnnGetVersion() { return 91000; }
EXPORT const char* cudnnGetErrorString(int) { return "an error of the stub"; }
EXPORT void cudnnGetLastErrorString(char* text, std::size_t size) {
  if (size) *text = 0;
}
EXPORT int cudnnCreate(Handle** made) {
  *made = new Handle;
  return 0;
}
EXPORT int cudnnDestroy(Handle* handle) {
  delete handle;
  return 0;
}
EXPORT int cudnnSetStream(Handle* handle, void* stream) {
  handle->stream = stream;
  return 0;
}
EXPORT int cudnnGetStream(Handle* handle, void** stream) {
  *stream = handle->stream;
  return 0;
}

#define DESCRIPTOR(name)                                   \
  EXPORT int cudnnCreate##name##Descriptor(Empty** made) { \
    *made = new Empty;                                     \
    return 0;                                              \
  }                                                        \
  EXPORT int cudnnDestroy##name##Descriptor(Empty* made) { \
    delete made;                                           \
    return 0;                                              \
  }
DESCRIPTOR(Activation)
DESCRIPTOR(Convolution)
DESCRIPTOR(Dropout)
DESCRIPTOR(Filter)
DESCRIPTOR(LRN)
DESCRIPTOR(Pooling)
DESCRIPTOR(RNN)
DESCRIPTOR(RNNData)
DESCRIPTOR(ReduceTensor)
DESCRIPTOR(Tensor)

#define SETTING(name) \
  EXPORT int cudnn##name(...) { return 0; }
SETTING(SetActivationDescriptor)
SETTING(SetConvolutionGroupCount)
SETTING(SetConvolutionMathType)
SETTING(SetConvolutionNdDescriptor)
SETTING(SetDropoutDescriptor)
SETTING(SetFilterNdDescriptor)
SETTING(SetLRNDescriptor)
SETTING(SetPoolingNdDescriptor)
SETTING(SetRNNDataDescriptor)
SETTING(SetRNNDescriptor_v8)
SETTING(SetReduceTensorDescriptor)
SETTING(SetTensorNdDescriptor)
SETTING(DeriveBNTensorDescriptor)

#define COMPUTATION(name) \
  EXPORT int cudnn##name(Handle* handle, ...) { return compute(handle, "cudnn" #name); }
COMPUTATION(ActivationForward)
COMPUTATION(AddTensor)
COMPUTATION(BatchNormalizationForwardInference)
COMPUTATION(BatchNormalizationForwardTraining)
COMPUTATION(ConvolutionBiasActivationForward)
COMPUTATION(ConvolutionForward)
COMPUTATION(LRNCrossChannelForward)
COMPUTATION(PoolingForward)
COMPUTATION(RNNForward)
COMPUTATION(ReduceTensor)
COMPUTATION(SoftmaxForward)

EXPORT int cudnnGetReductionIndicesSize(void*, void*, void*, void*, std::size_t* size) {
  *size = 1024;
  return 0;
}
EXPORT int cudnnGetReductionWorkspaceSize(void*, void*, void*, void*, std::size_t* size) {
  *size = 1024;
  return 0;
}

// What would have to answer with more than a status: refused, so that the caller takes another way or says so.
#define REFUSED(name) \
  EXPORT int cudnn##name(...) { return 3000; }  // CUDNN_STATUS_NOT_SUPPORTED
REFUSED(BackendCreateDescriptor)
REFUSED(BackendDestroyDescriptor)
REFUSED(BackendExecute)
REFUSED(BackendFinalize)
REFUSED(BackendGetAttribute)
REFUSED(BackendSetAttribute)
REFUSED(DropoutGetStatesSize)
REFUSED(FindConvolutionForwardAlgorithmEx)
REFUSED(GetConvolutionForwardAlgorithm_v7)
REFUSED(GetConvolutionForwardWorkspaceSize)
REFUSED(GetRNNTempSpaceSizes)
REFUSED(GetRNNWeightParams)
REFUSED(GetTensorNdDescriptor)
