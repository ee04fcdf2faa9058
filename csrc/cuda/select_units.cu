// Binds select_units.cuh to torch.
#include "stream.h"
//
#include "cuda/select_units.cuh"

namespace sk::select_units {
namespace {

Tensor fill(const Tensor& cost, const Tensor& segment, const Tensor& free, const Tensor& left,
            bool prefix, int64_t segments) {
    check_dtype(cost, "cost", ScalarType::Double);
    check_dtype(segment, "segment", ScalarType::Long);
    check_dtype(free, "free", ScalarType::Bool);
    check_dtype(left, "left", ScalarType::Double);
    for (const Tensor* t : {&cost, &segment, &free, &left}) {
        check_cuda(*t, "chunks");
        check_contiguous(*t, "chunks");
    }
    const int64_t n = cost.numel();
    check_numel(segment, "segment", n);
    check_numel(free, "free", n);
    check_count(segments, "segments", 0, kNever - 1);
    STD_TORCH_CHECK(n < kNever, "cost: expected fewer than 2**31 chunks, got ", n);
    STD_TORCH_CHECK(left.numel() == 1, "left: expected one number, got ", left.numel());
    const torch::stable::accelerator::DeviceGuard guard(cost.get_device_index());
    Tensor chosen = torch::stable::new_empty(free, {n});
    Tensor ended = torch::stable::new_empty(free, {segments + 1}, ScalarType::Int);
    launch(Fill{static_cast<const double*>(cost.const_data_ptr()),
                static_cast<const int64_t*>(segment.const_data_ptr()),
                static_cast<const bool*>(free.const_data_ptr()),
                static_cast<const double*>(left.const_data_ptr()),
                static_cast<bool*>(chosen.mutable_data_ptr()),
                static_cast<int*>(ended.mutable_data_ptr()), n, (int)segments, prefix},
           current_stream(cost));
    check_launch("fill_in_order");
    return chosen;
}

}  // namespace
}  // namespace sk::select_units

STABLE_TORCH_LIBRARY_FRAGMENT(sensikernels_native, m) {
    m.def(
        "fill_in_order(Tensor cost, Tensor segment, Tensor free, Tensor left, bool prefix, "
        "int segments) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CUDA, m) {
    m.impl("fill_in_order", TORCH_BOX(&sk::select_units::fill));
}
