// Included by every launcher: argument checks, and the CUDA stream torch is working on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace sk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_dtype(const Tensor& t, const char* name, ScalarType dtype) {
    STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": expected dtype ", toString(dtype), ", got ",
                    toString(t.scalar_type()));
}

inline void check_contiguous(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor, got a strided one");
}

inline void check_dim(const Tensor& t, const char* name, int64_t dim) {
    STD_TORCH_CHECK(t.dim() == dim, name, ": expected ", dim, " dimensions, got ", t.dim());
}

inline void check_size(const Tensor& t, const char* name, int64_t dim, int64_t size) {
    STD_TORCH_CHECK(t.size(dim) == size, name, ": expected size ", size, " in dimension ", dim,
                    ", got ", t.size(dim));
}

inline void check_cpu(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
}

inline void check_cuda(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.is_cuda(), name, ": expected a CUDA tensor");
}

}  // namespace sk
