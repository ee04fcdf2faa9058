// What a step knows of one parameter; `sensikernels/ops/subset_adamw/native.py` fills the table.
#pragma once

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
    double* clock;       // kTouched: [3]
    double* row_clock;   // kTouched: [rows, 3]
    int64_t kind, param_dtype, grad_dtype;
    int64_t rows, columns;
    int64_t units;  // entries of `index`
    int64_t cohorts;
    int64_t block_rows, block_columns;
    int64_t group;  // row of the hyper table

    SK_HOST_DEVICE bool sums() const { return sum_abs || sum_squared; }
};
static_assert(sizeof(Item) == 24 * 8, "one int64 per field");

// Units [first, end) of an item: entries (kAll), spans (kElements, kMasked), rows (kColumns, and
// the three before where rows are summed), block rows (kBlocks, summed), else entries of `index`.
struct Chunk {
    int64_t item, first, end;
};

}  // namespace sk::subset_adamw
