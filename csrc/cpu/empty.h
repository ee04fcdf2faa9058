// Uninitialised results. Asking the dispatcher for them by name costs more than a small product.
#pragma once

#include "checks.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstring>
#include <initializer_list>

namespace sk {

// Set by tests: memory is NaN until it is written.
inline bool poisoned = false;

// A contiguous CPU tensor of the dtype of `like`, with at most three dimensions.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
    const int64_t dims = sizes.size();
    int64_t strides[3], step = 1;
    for (int64_t i = dims - 1; i >= 0; --i) {
        strides[i] = step;
        step *= sizes.begin()[i];
    }
    int32_t dtype;
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes.begin(), strides, dtype,
                                                    aoti_torch_device_type_cpu(), 0, &handle));
    Tensor out(handle);
    if (poisoned) std::memset(out.data_ptr(), 0xff, step * out.element_size());
    return out;
}

}  // namespace sk
