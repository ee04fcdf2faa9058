// Binds subset_adamw.cuh to torch.
#include "stream.h"
//
#include "cuda/subset_adamw.cuh"
#include "subset_adamw_checks.h"

#include <optional>
#include <tuple>

namespace sk::subset_adamw {
namespace {

int resident_blocks(int device) {
    int processors = 0;
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    return processors * (2048 / kThreads);
}

void step(const Tensor& table, const Tensor& chunks, const Tensor& hyper, Tensor partials,
          Tensor norm, int64_t dtypes, double max_grad_norm,
          const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
    check_tables(table, chunks, hyper, partials, norm, check_cuda);
    const int64_t parameters = table.size(0), bytes = parameters * sizeof(Rates);
    Tensor rates = torch::stable::new_empty(partials, {bytes / 8});
    const auto scalar = [](const std::optional<Tensor>& t, const char* name) -> const float* {
        if (!t) return nullptr;
        check_cuda(*t, name);
        check_dtype(*t, name, ScalarType::Float);
        check_numel(*t, name, 1);
        return static_cast<const float*>(t->const_data_ptr());
    };
    const torch::stable::accelerator::DeviceGuard guard(table.get_device_index());
    const Launch on{static_cast<const Item*>(table.const_data_ptr()),
                    parameters,
                    static_cast<const Chunk*>(chunks.const_data_ptr()),
                    chunks.size(0),
                    dtypes,
                    static_cast<Rates*>(rates.mutable_data_ptr()),
                    resident_blocks(table.get_device_index()),
                    current_stream(table)};
    launch_step(on, static_cast<const double*>(hyper.const_data_ptr()),
                static_cast<double*>(partials.mutable_data_ptr()),
                static_cast<float*>(norm.mutable_data_ptr()), static_cast<float>(max_grad_norm),
                scalar(grad_scale, "grad_scale"), scalar(found_inf, "found_inf"));
    check_launch("subset_adamw_step");
}

std::tuple<Tensor, Tensor> coalesce(const Tensor& rows, const Tensor& order, const Tensor& values,
                                    Tensor table, int64_t place) {
    for (const Tensor& t : {rows, order}) {
        check_dtype(t, "rows", ScalarType::Long);
        check_contiguous(t, "rows");
        check_cuda(t, "rows");
        check_size(t, "rows", 0, values.size(0));
    }
    check_contiguous(values, "values");
    check_cuda(values, "values");
    check_dtype(table, "table", ScalarType::Long);
    check_contiguous(table, "table");
    check_cuda(table, "table");
    check_size(table, "table", 1, sizeof(Item) / 8);
    check_count(place, "place", 0, table.size(0) - 1);
    const int64_t n = rows.size(0), wide = n ? values.numel() / n : 0;
    const int device = rows.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    Tensor touched = torch::stable::new_empty(rows, {n}, ScalarType::Int);
    Tensor sums = torch::stable::new_empty(values, values.sizes(), ScalarType::Float);
    if (n == 0) return {touched, sums};
    const int64_t warps = n * ((wide + 4 * kWarp - 1) / (4 * kWarp));
    const auto launch = [&](auto zero) {
        using G = decltype(zero);
        SK_LAUNCH(coalesce_rows<G>, blocks_for(warps, resident_blocks(device)), kThreads, 0,
                  current_stream(rows), static_cast<const int64_t*>(rows.const_data_ptr()),
                  static_cast<const int64_t*>(order.const_data_ptr()),
                  static_cast<const G*>(values.const_data_ptr()), n, wide,
                  static_cast<int32_t*>(touched.mutable_data_ptr()),
                  static_cast<float*>(sums.mutable_data_ptr()),
                  static_cast<Item*>(table.mutable_data_ptr()) + place);
    };
    switch (values.scalar_type()) {
        case ScalarType::Float:
            launch(float{});
            break;
        case ScalarType::BFloat16:
            launch(__nv_bfloat16{});
            break;
        case ScalarType::Half:
            launch(__half{});
            break;
        default:
            STD_TORCH_CHECK(false, "values: expected float32, bfloat16 or float16");
    }
    check_launch("subset_adamw_coalesce_sorted");
    return {touched, sums};
}

}  // namespace
}  // namespace sk::subset_adamw

STABLE_TORCH_LIBRARY_FRAGMENT(sensikernels_native, m) {
    m.def(
        "subset_adamw_coalesce_sorted(Tensor rows, Tensor order, Tensor values, Tensor(a!) table, "
        "int place) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CUDA, m) {
    m.impl("subset_adamw_step", TORCH_BOX(&sk::subset_adamw::step));
    m.impl("subset_adamw_coalesce_sorted", TORCH_BOX(&sk::subset_adamw::coalesce));
}
