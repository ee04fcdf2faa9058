// What a step knows of one parameter; `sensikernels/ops/subset_adamw/native.py` fills the table.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define SK_HOST_DEVICE __host__ __device__
#else
#define SK_HOST_DEVICE
#endif

namespace sk::subset_adamw {

enum Kind : int64_t { kAll, kRows, kColumns, kBlocks, kElements, kMasked, kTouched };
enum DType : int64_t { kFloat, kBFloat16, kHalf };
enum Hyper { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kHypers };

constexpr int64_t kSpan = 4096;  // entries per rank offset of packed bits
constexpr int kCohorts = 256;    // of a parameter, at most
constexpr double kTiny = 1e-300;
constexpr int kClock = 5;  // Σlog(1 - lr·λ), Σlog β₁, Σlog β₂, Σlr, the last lr

// One row of the table; `FIELDS` in native.py has the same order. A parameter is [rows, columns].
struct Item {
    void* param;
    const void* grad;
    float* exp_avg;
    float* exp_avg_sq;
    float* master;  // or null
    float* step;
    const void* index;       // int32 units; for kElements and kMasked packed bits
    const int64_t* offsets;  // kElements: kept entries before each span
    const uint8_t* cohort;   // per kept entry, or null
    const float* cohort_start;
    float* sum_abs;      // [rows], or null
    float* sum_squared;  // [rows], or null
    double* clock;       // kTouched: [kClock]
    double* row_clock;   // kTouched: [rows, kClock]
    int64_t kind, param_dtype, grad_dtype;
    int64_t rows, columns;
    int64_t units;  // entries of `index`
    int64_t cohorts;
    int64_t block_rows, block_columns;
    int64_t group;  // row of the hyper table

    SK_HOST_DEVICE bool sums() const { return sum_abs || sum_squared; }
};
static_assert(sizeof(Item) == 24 * 8, "one int64 per field");

// What one step adds to the clock; the last lr it sets.
SK_HOST_DEVICE inline void tick(double* clock, const double* hyper) {
    const double factors[] = {1 - hyper[kLr] * hyper[kWeightDecay], hyper[kBeta1], hyper[kBeta2]};
    for (int k = 0; k < 3; ++k) clock[k] += std::log(factors[k] > kTiny ? factors[k] : kTiny);
    clock[3] += hyper[kLr];
    clock[4] = hyper[kLr];
}

// How far the steps that a row missed would have moved it, in units of -m / (√v + ε) at its last
// one: Σ over them of lr √(1 - β₂ᵗ) / (1 - β₁ᵗ) (β₁/√β₂)ᵏ, each decayed by what came after it.
// Betas are taken as constant and the learning rate as a straight line. Terms `first`, `first +
// stride`, ….
SK_HOST_DEVICE inline double missed_moves(const double* now, const double* row, const double* hyper,
                                          double steps, int first, int stride) {
    constexpr double kTerms = 256, kLeast = 1e-6;  // of the first: no more, no less is added
    const double log1 = std::log(hyper[kBeta1] > kTiny ? hyper[kBeta1] : kTiny);
    const double log2 = std::log(hyper[kBeta2] > kTiny ? hyper[kBeta2] : kTiny);
    const double log_ratio = log1 - 0.5 * log2, decay = now[0] - row[0], rates = now[3] - row[3];
    const double missed = std::floor((now[1] - row[1]) / log1 + 0.5);
    if (missed < 1 || rates <= 0) return 0;
    const double start = row[4] != 0 ? row[4] : rates / missed;  // 0: not known
    const double slope = 2 * (rates / missed - start) / (missed + 1);
    double total = 0;
    for (double k = first; k <= missed && k <= kTerms; k += stride) {
        const double power = std::exp(k * log_ratio);
        if (power < kLeast) break;
        const double age = steps - missed + k, lr = start + slope * k;
        const double since = 1 - k * (start + 0.5 * slope * (k + 1)) / rates;
        total += lr * power * std::sqrt(1 - std::exp(age * log2)) / (1 - std::exp(age * log1)) *
                 std::exp(decay * since);
    }
    return total;
}

// Units [first, end) of an item: entries (kAll), spans (kElements, kMasked), rows (kColumns, and
// the three before where rows are summed), block rows (kBlocks, summed), else entries of `index`.
struct Chunk {
    int64_t item, first, end;
};

}  // namespace sk::subset_adamw
