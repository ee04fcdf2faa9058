// Dynamic scheduling for streaming work: each thread keeps to a stretch of its own.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <memory>

namespace sk {

// Calls run(lane, i) for i in 0..n-1, each once. A lane takes its own stretch in order, then what
// is left of the others': memory read by neighbours in turns came an eighth slower.
template <class F>
void for_each_in_ranges(int64_t n, int64_t lanes, const F& run) {
    struct alignas(64) Range {
        std::atomic<int64_t> next;
        int64_t end;
    };
    if (n <= 0) return;
    const std::unique_ptr<Range[]> ranges(new Range[lanes]);
    for (int64_t lane = 0; lane < lanes; ++lane) {
        ranges[lane].next = n * lane / lanes;
        ranges[lane].end = n * (lane + 1) / lanes;
    }
    torch::stable::parallel_for(0, lanes, 1, [&](int64_t begin, int64_t end) {
        for (int64_t lane = begin; lane < end; ++lane)
            for (int64_t other = 0; other < lanes; ++other) {
                Range& range = ranges[(lane + other) % lanes];
                for (int64_t i;
                     (i = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;)
                    run(lane, i);
            }
    });
}

}  // namespace sk
