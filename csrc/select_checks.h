// The arguments of select_elements, checked alike for both devices.
#pragma once

#include <vector>

#include "checks.h"

namespace sk {

// A dtype as the tables of both devices write it.
inline int64_t type_code(const Tensor& t) {
    switch (t.scalar_type()) {
        case ScalarType::Float:
            return 0;
        case ScalarType::BFloat16:
            return 1;
        case ScalarType::Half:
            return 2;
        default:
            STD_TORCH_CHECK(false, "tensors: expected float32, bfloat16 or float16, got ",
                            toString(t.scalar_type()));
    }
    return -1;
}

// `check_device`: check_cpu or check_cuda.
template <class CheckDevice>
void check_select(size_t tensors, size_t grads, size_t offsets, size_t k, int64_t score, int scores,
                  const Tensor& arena, const Tensor& threshold, const Tensor& counts,
                  CheckDevice check_device) {
    STD_TORCH_CHECK(0 <= score && score < scores, "score: expected a code below ", scores, ", got ",
                    score);
    STD_TORCH_CHECK(grads == tensors && offsets == tensors, "grads: expected ", tensors,
                    " tensors, got ", grads);
    STD_TORCH_CHECK(k == 1 || k == tensors, "k: expected 1 or ", tensors, " counts, got ", k);
    check_dtype(arena, "arena", ScalarType::Byte);
    check_dtype(threshold, "threshold", ScalarType::Float);
    check_dtype(counts, "counts", ScalarType::Long);
    for (const Tensor* t : {&arena, &threshold, &counts}) {
        check_device(*t, "arena, threshold, counts");
        check_contiguous(*t, "arena, threshold, counts");
    }
    check_numel(counts, "counts", tensors);
    check_numel(threshold, "threshold", k);
}

}  // namespace sk
