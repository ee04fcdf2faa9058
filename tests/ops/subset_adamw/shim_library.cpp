// The GPU kernels of a step as functions Python can call on memory of the CPU.
#include "cuda/subset_adamw.cuh"

using namespace sk::subset_adamw;

extern "C" void sk_step(const void* items, int64_t parameters, const void* chunks, int64_t count,
                        int64_t dtypes, const double* hyper, double* partials, float* norm,
                        float max_grad_norm) {
    std::vector<Rates> rates(parameters);
    const Launch on{static_cast<const Item*>(items),
                    parameters,
                    static_cast<const Chunk*>(chunks),
                    count,
                    dtypes,
                    rates.data(),
                    2,
                    nullptr};
    launch_step(on, hyper, partials, norm, max_grad_norm, nullptr, nullptr);
}

extern "C" void sk_coalesce(const int64_t* rows, const int64_t* order, const float* values,
                            int64_t n, int64_t wide, int32_t* touched, float* sums, void* items,
                            int64_t place) {
    SK_LAUNCH(coalesce_rows<float>, 2, kThreads, 0, nullptr, rows, order, values, n, wide, touched,
              sums, static_cast<Item*>(items) + place);
}
