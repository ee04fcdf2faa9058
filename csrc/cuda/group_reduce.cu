// Binds group_reduce.cuh to torch.
#include "stream.h"
//
#include "cuda/group_reduce.cuh"

#include <optional>

namespace sk::group_reduce {
namespace {

float* arena(const std::optional<Tensor>& t, const char* name, int64_t slots, int64_t groups) {
    if (!t) return nullptr;
    check_cuda(*t, name);
    check_dtype(*t, name, ScalarType::Float);
    check_contiguous(*t, name);
    check_dim(*t, name, 2);
    check_size(*t, name, 0, slots);
    check_size(*t, name, 1, groups);
    return static_cast<float*>(t->mutable_data_ptr());
}

template <class T>
const T* table(const Tensor& t, const char* name, ScalarType dtype) {
    check_cuda(t, name);
    check_dtype(t, name, dtype);
    check_contiguous(t, name);
    return static_cast<const T*>(t.const_data_ptr());
}

void group_reduce(Tensor descriptors, Tensor chunks, Tensor starts, Tensor order, Tensor members,
                  int64_t statistics, Tensor partials, Tensor out, std::optional<Tensor> running,
                  std::optional<Tensor> ema, double decay) {
    check_size(chunks, "chunks", 1, sizeof(Chunk) / 8);
    check_size(descriptors, "descriptors", 1, sizeof(Descriptor) / 8);
    STD_TORCH_CHECK(statistics > 0 && statistics < 1 << kStatistics,
                    "statistics: expected bits of ", (int)kStatistics, " statistics, got ",
                    statistics);
    STD_TORCH_CHECK(starts.numel() > 0, "starts: expected at least one offset");
    const unsigned mask = (unsigned)statistics;
    const int64_t slots = __builtin_popcount(mask), groups = starts.numel() - 1;
    const int64_t n_partials = partials.size(1);
    float* scratch = arena(partials, "partials", slots, n_partials);
    const Work work{table<Descriptor>(descriptors, "descriptors", ScalarType::Long),
                    table<Chunk>(chunks, "chunks", ScalarType::Long),
                    table<int64_t>(members, "members", ScalarType::Long),
                    scratch,
                    chunks.size(0),
                    n_partials,
                    mask};
    const int32_t* places = table<int32_t>(order, "order", ScalarType::Int);
    const Finish finish{table<int64_t>(starts, "starts", ScalarType::Long),
                        order.numel() ? places : nullptr,
                        scratch,
                        arena(out, "out", slots, groups),
                        arena(running, "running", slots, groups),
                        arena(ema, "ema", slots, groups),
                        n_partials,
                        groups,
                        mask,
                        (float)decay};
    const int device = chunks.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    int processors = 0;
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    launch(work, finish, 2 * processors, current_stream(chunks));
    check_launch("group_reduce");
}

}  // namespace
}  // namespace sk::group_reduce

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CUDA, m) {
    m.impl("group_reduce", TORCH_BOX(&sk::group_reduce::group_reduce));
}
