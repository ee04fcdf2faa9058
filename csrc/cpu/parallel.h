// Dynamic scheduling on torch's own threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace sk {

inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// Calls run(0..n-1), each once, whichever thread is free taking the next.
template <class F>
void for_each(int64_t n, const F& run) {
    std::atomic<int64_t> next{0};
    const int64_t threads = std::min<int64_t>(n, torch::stable::get_num_threads());
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t lane = begin; lane < end; ++lane)
            for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) run(i);
    });
}

}  // namespace sk
