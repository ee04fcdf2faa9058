// The tables of a step, checked alike for both devices.
#pragma once

#include "checks.h"
#include "subset_adamw.h"

namespace sk::subset_adamw {

inline void check_table(const Tensor& t, const char* name, ScalarType dtype, int64_t width) {
    check_dtype(t, name, dtype);
    check_dim(t, name, 2);
    check_size(t, name, 1, width);
}

// `check_device`: check_cpu or check_cuda.
template <class CheckDevice>
void check_tables(const Tensor& table, const Tensor& chunks, const Tensor& hyper,
                  const Tensor& partials, const Tensor& norm, CheckDevice check_device) {
    check_table(table, "table", ScalarType::Long, sizeof(Item) / 8);
    check_table(chunks, "chunks", ScalarType::Long, 3);
    check_table(hyper, "hyper", ScalarType::Double, kHypers);
    check_dtype(partials, "partials", ScalarType::Double);
    check_size(partials, "partials", 0, chunks.size(0));
    for (const Tensor* t : {&table, &chunks, &hyper, &partials}) {
        check_contiguous(*t, "table");
        check_device(*t, "table");
    }
    check_device(norm, "norm");
    check_dtype(norm, "norm", ScalarType::Float);
    check_numel(norm, "norm", 1);
}

}  // namespace sk::subset_adamw
