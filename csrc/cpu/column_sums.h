// Sums over rows whose bits do not depend on the number of threads.
#pragma once

#include "cpu/parallel.h"

#include <cstring>
#include <memory>

#define SK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))

namespace sk {

// The rows in chunks that depend on their number alone.
struct RowChunks {
    int64_t rows, each, count;

    explicit RowChunks(int64_t rows)
        : rows(rows),
          each(std::max<int64_t>(16, ceil_div(rows, 128))),
          count(ceil_div(rows, each)) {}
    int64_t begin(int64_t chunk) const { return chunk * each; }
    int64_t end(int64_t chunk) const { return std::min(rows, begin(chunk) + each); }
};

// A row of `width` sums for each chunk, added up in the order of the chunks.
class ColumnSums {
  public:
    ColumnSums(int64_t chunks, int64_t width)
        : chunks_(chunks), width_(width), partial_(new float[chunks * width]) {}

    // The sums of one chunk, zero at first.
    float* of(int64_t chunk) const {
        float* sums = partial_.get() + chunk * width_;
        std::fill_n(sums, width_, 0.0f);
        return sums;
    }

    void add_up(float* out) const {
        constexpr int64_t kStrip = 256;
        for_each(ceil_div(width_, kStrip), [&](int64_t strip) {
            const int64_t first = strip * kStrip, n = std::min(kStrip, width_ - first);
            float total[kStrip] = {};
            for (int64_t c = 0; c < chunks_; ++c) {
                const float* part = partial_.get() + c * width_ + first;
                for (int64_t j = 0; j < n; ++j) total[j] += part[j];
            }
            std::memcpy(out + first, total, n * sizeof(float));
        });
    }

  private:
    int64_t chunks_, width_;
    std::unique_ptr<float[]> partial_;
};

}  // namespace sk
