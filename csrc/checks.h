// Included by every launcher: argument checks, and the CUDA stream torch is working on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>

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

inline void check_numel(const Tensor& t, const char* name, int64_t numel) {
    STD_TORCH_CHECK(t.numel() == numel, name, ": expected ", numel, " elements, got ", t.numel());
}

inline void check_count(int64_t value, const char* name, int64_t least, int64_t most) {
    STD_TORCH_CHECK(least <= value && value <= most, name, ": expected a number from ", least,
                    " to ", most, ", got ", value);
}

// Whether each of n entries lies in [low, high) and, `ascending`, above the one before it. No
// branch: one pass at the speed of memory.
template <class T>
inline bool lies_within(const T* index, int64_t n, int64_t low, int64_t high, bool ascending) {
    using Limits = std::numeric_limits<T>;
    if (n == 0) return true;
    if (low > Limits::max() || high - 1 < Limits::min() || high <= low) return false;
    const T least = low < Limits::min() ? Limits::min() : static_cast<T>(low);
    const T most = high - 1 > Limits::max() ? Limits::max() : static_cast<T>(high - 1);
    unsigned wrong = 0;
    for (int64_t i = 0; i < n; ++i) wrong |= (index[i] < least) | (index[i] > most);
    if (ascending)
        for (int64_t i = 1; i < n; ++i) wrong |= index[i] <= index[i - 1];
    return wrong == 0;
}

// The first place where that does not hold; -1 if there is none.
template <class T>
inline int64_t first_outside(const T* index, int64_t n, int64_t low, int64_t high, bool ascending) {
    if (lies_within(index, n, low, high, ascending)) return -1;
    for (int64_t i = 0; i < n; ++i)
        if (index[i] < low || index[i] >= high || (ascending && i && index[i] <= index[i - 1]))
            return i;
    return -1;
}

template <class T>
inline void check_index(const T* index, int64_t n, const char* name, int64_t low, int64_t high,
                        bool ascending = false) {
    const int64_t at = first_outside(index, n, low, high, ascending);
    STD_TORCH_CHECK(at < 0, name, ": expected ", ascending ? "ascending " : "", "entries in [", low,
                    ", ", high, "), got ", index[at < 0 ? 0 : at], " at ", at);
}

// `ptr` of `lines` + 1 entries: from 0 up to `last`, never down.
inline void check_pointers(const int32_t* ptr, int64_t lines, const char* name, int64_t last) {
    unsigned down = 0;
    for (int64_t i = 0; i < lines; ++i) down |= ptr[i + 1] < ptr[i];
    STD_TORCH_CHECK(down == 0 && ptr[0] == 0 && ptr[lines] == last, name,
                    ": expected offsets that rise from 0 to ", last);
}

inline void check_cpu(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
}

inline void check_cuda(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.is_cuda(), name, ": expected a CUDA tensor");
}

}  // namespace sk
