// The stream torch works on, and launch errors. Linking libtorch_cuda would make the library
// unloadable beside a CPU torch, so its one function is looked up when first needed.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>

#include "checks.h"

namespace sk {

inline cudaStream_t current_stream(const Tensor& on) {
    using GetStream = int32_t (*)(int32_t device, void** stream);
    static const GetStream get_stream = [] {
        void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
        void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
        return reinterpret_cast<GetStream>(symbol);
    }();
    STD_TORCH_CHECK(get_stream != nullptr,
                    "this torch has no CUDA: libtorch_cuda.so is not loaded");
    void* stream = nullptr;
    STD_TORCH_CHECK(get_stream(on.get_device_index(), &stream) == 0, "torch gave no CUDA stream");
    return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* kernel) {
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, kernel, ": launch failed: ", cudaGetErrorString(error));
}

}  // namespace sk
