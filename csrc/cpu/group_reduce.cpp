// One streaming pass over all (weight, gradient) pairs; the work list is group_reduce/table.py's.
//
// A chunk's partial sums depend on the chunk alone and groups add them in a fixed order, so the
// result has the same bits for any number of threads.
#include "checks.h"
#include "cpu/lanes.h"
#include "cpu/ranges.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>

#define SK_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))

namespace {

using namespace sk;

enum Statistic { kAbsWG, kWG, kWG2, kG2, kAbsG, kW2, kAbsW, kMaxG, kStatistics };
enum Kind : int64_t { kRowSums, kColumnSums, kGather };

struct Descriptor {
    const void *weight, *grad;
    int64_t weight_stride, grad_stride, weight_type, grad_type;
};

struct Chunk {
    int64_t kind, tensor, row0, rows, col0, cols, block, pitch, partial0;
};

constexpr int64_t kTile = 512;    // elements converted, and summed lane by lane, at a time
constexpr int64_t kBlock = 4096;  // elements summed in float before a total in double
constexpr int64_t kStrip = 2048;  // columns of a strip, as in table.py
SK_INLINE Vec term(int statistic, const Vec& w, const Vec& g) {
    switch (statistic) {
        case kAbsWG:
            return magnitude(w * g);
        case kWG:
            return w * g;
        case kWG2:
            return (w * g) * (w * g);
        case kG2:
            return g * g;
        case kAbsG:
            return magnitude(g);
        case kW2:
            return w * w;
        case kAbsW:
            return magnitude(w);
        default:
            return magnitude(g);
    }
}

// Two accumulators per statistic hide the latency of the additions.
SK_INLINE void accumulate(unsigned mask, const float* w, const float* g, int64_t n,
                          Vec (&acc)[kStatistics][2]) {
#define SK_EACH(STATISTIC)                                                                       \
    if (mask >> STATISTIC & 1) {                                                                 \
        if constexpr (STATISTIC == kMaxG) {                                                      \
            acc[STATISTIC][0] = larger(acc[STATISTIC][0], larger(magnitude(g0), magnitude(g2))); \
            acc[STATISTIC][1] = larger(acc[STATISTIC][1], larger(magnitude(g1), magnitude(g3))); \
        } else {                                                                                 \
            acc[STATISTIC][0] += term(STATISTIC, w0, g0) + term(STATISTIC, w2, g2);              \
            acc[STATISTIC][1] += term(STATISTIC, w1, g1) + term(STATISTIC, w3, g3);              \
        }                                                                                        \
    }
#define SK_ALL      \
    SK_EACH(kAbsWG) \
    SK_EACH(kWG)    \
    SK_EACH(kWG2) SK_EACH(kG2) SK_EACH(kAbsG) SK_EACH(kW2) SK_EACH(kAbsW) SK_EACH(kMaxG)
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
        const Vec w0 = load(w + i), w1 = load(w + i + 16), w2 = load(w + i + 32),
                  w3 = load(w + i + 48);
        const Vec g0 = load(g + i), g1 = load(g + i + 16), g2 = load(g + i + 32),
                  g3 = load(g + i + 48);
        SK_ALL
    }
    if (i < n) {
        float pad[8][kLanes] = {};
        std::memcpy(pad[0], w + i, (n - i) * 4);
        std::memcpy(pad[4], g + i, (n - i) * 4);
        const Vec w0 = load(pad[0]), w1 = load(pad[1]), w2 = load(pad[2]), w3 = load(pad[3]);
        const Vec g0 = load(pad[4]), g1 = load(pad[5]), g2 = load(pad[6]), g3 = load(pad[7]);
        SK_ALL
    }
#undef SK_ALL
#undef SK_EACH
}

// Lanes are summed per tile before they are added up, so that no chain of additions gets long.
SK_INLINE void add_tile(unsigned mask, const float* w, const float* g, int64_t n,
                        Vec (&sum)[kStatistics]) {
    Vec acc[kStatistics][2] = {};
    accumulate(mask, w, g, n, acc);
    for (int s = 0; s < kMaxG; ++s)
        if (mask >> s & 1) sum[s] += acc[s][0] + acc[s][1];
    if (mask >> kMaxG & 1) sum[kMaxG] = larger(sum[kMaxG], larger(acc[kMaxG][0], acc[kMaxG][1]));
}

SK_INLINE void fold_all(unsigned mask, const Vec (&sum)[kStatistics],
                        double (&total)[kStatistics]) {
    for (int s = 0; s < kMaxG; ++s)
        if (mask >> s & 1) total[s] += fold(sum[s]);
    if (mask >> kMaxG & 1) total[kMaxG] = larger((float)total[kMaxG], fold_larger(sum[kMaxG]));
}

struct Work {
    const Descriptor* tensors;
    const Chunk* chunks;
    const int64_t* members;
    float* partials;
    int64_t n_partials;
    unsigned mask;
};

// Inlined once per usual mask, so that its sums stay in registers.
SK_INLINE void row_sums_of(const Work& work, const Chunk& c, unsigned mask) {
    const Descriptor& t = work.tensors[c.tensor];
    const int64_t w_pitch = c.pitch ? c.pitch : t.weight_stride;
    const int64_t g_pitch = c.pitch ? c.pitch : t.grad_stride;
    alignas(64) float w_scratch[kTile], g_scratch[kTile];
    for (int64_t r = 0; r < c.rows; ++r) {
        const int64_t w0 = (c.row0 + r) * w_pitch + c.col0, g0 = (c.row0 + r) * g_pitch + c.col0;
        double total[kStatistics] = {};
        for (int64_t begin = 0; begin < c.cols; begin += kBlock) {
            Vec sum[kStatistics] = {};
            for (int64_t i = begin; i < std::min(begin + kBlock, c.cols); i += kTile) {
                const int64_t n = std::min(kTile, c.cols - i);
                const float* w = as_float(t.weight, t.weight_type, w0 + i, n, w_scratch);
                const float* g = as_float(t.grad, t.grad_type, g0 + i, n, g_scratch);
                add_tile(mask, w, g, n, sum);
            }
            fold_all(mask, sum, total);
        }
        float* out = work.partials + c.partial0 + r;
        for (int s = 0; s < kStatistics; ++s)
            if (mask >> s & 1) *out = (float)total[s], out += work.n_partials;
    }
}

SK_SIMD void row_sums(const Work& work, const Chunk& c) {
    constexpr unsigned first = 1u << kAbsWG, second = 1u << kG2;
    if (work.mask == (first | second)) return row_sums_of(work, c, first | second);
    if (work.mask == first) return row_sums_of(work, c, first);
    if (work.mask == second) return row_sums_of(work, c, second);
    row_sums_of(work, c, work.mask);
}

// Adds the terms of up to four rows to the running column sums of one statistic.
template <int statistic>
SK_INLINE void add_rows(const float* const (&w)[4], const float* const (&g)[4], int rows, int64_t n,
                        float* acc) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        Vec t[4] = {};
        for (int r = 0; r < rows; ++r) t[r] = term(statistic, load(w[r] + i), load(g[r] + i));
        const Vec sum = load(acc + i);
        if (statistic == kMaxG)
            store(acc + i, larger(sum, larger(larger(t[0], t[1]), larger(t[2], t[3]))));
        else
            store(acc + i, sum + ((t[0] + t[1]) + (t[2] + t[3])));
    }
    for (; i < n; ++i)
        for (int r = 0; r < rows; ++r) {
            const float t = term(statistic, Vec{w[r][i]}, Vec{g[r][i]})[0];
            acc[i] = statistic == kMaxG ? larger(acc[i], t) : acc[i] + t;
        }
}

SK_INLINE void add_rows_of(int statistic, const float* const (&w)[4], const float* const (&g)[4],
                           int rows, int64_t n, float* acc) {
    switch (statistic) {
        case kAbsWG:
            return add_rows<kAbsWG>(w, g, rows, n, acc);
        case kWG:
            return add_rows<kWG>(w, g, rows, n, acc);
        case kWG2:
            return add_rows<kWG2>(w, g, rows, n, acc);
        case kG2:
            return add_rows<kG2>(w, g, rows, n, acc);
        case kAbsG:
            return add_rows<kAbsG>(w, g, rows, n, acc);
        case kW2:
            return add_rows<kW2>(w, g, rows, n, acc);
        case kAbsW:
            return add_rows<kAbsW>(w, g, rows, n, acc);
        default:
            return add_rows<kMaxG>(w, g, rows, n, acc);
    }
}

SK_SIMD void column_sums(const Work& work, const Chunk& c) {
    const Descriptor& t = work.tensors[c.tensor];
    const int64_t w_pitch = c.pitch ? c.pitch : t.weight_stride;
    const int64_t g_pitch = c.pitch ? c.pitch : t.grad_stride;
    alignas(64) float w_scratch[4][kTile], g_scratch[4][kTile];
    alignas(64) float acc[kStatistics][kStrip];
    // A block wider than a strip is the chunk's only one, and one partial over several strips.
    const int64_t step = c.block < kStrip ? kStrip / c.block * c.block : kStrip;
    double wide[kStatistics] = {};
    for (int64_t strip = 0; strip < c.cols; strip += step) {
        const int64_t width = std::min(step, c.cols - strip);
        for (int s = 0; s < kStatistics; ++s)
            if (work.mask >> s & 1) std::memset(acc[s], 0, width * 4);
        for (int64_t r = 0; r < c.rows; r += 4) {
            const int rows = (int)std::min<int64_t>(4, c.rows - r);
            for (int64_t i = 0; i < width; i += kTile) {
                const int64_t n = std::min(kTile, width - i);
                const float *w[4] = {}, *g[4] = {};
                for (int q = 0; q < rows; ++q) {
                    const int64_t row = c.row0 + r + q, col = c.col0 + strip + i;
                    w[q] = as_float(t.weight, t.weight_type, row * w_pitch + col, n, w_scratch[q]);
                    g[q] = as_float(t.grad, t.grad_type, row * g_pitch + col, n, g_scratch[q]);
                }
                for (int s = 0; s < kStatistics; ++s)
                    if (work.mask >> s & 1) add_rows_of(s, w, g, rows, n, acc[s] + i);
            }
        }
        float* out = work.partials + c.partial0 + strip / c.block;
        for (int s = 0; s < kStatistics; ++s) {
            if (!(work.mask >> s & 1)) continue;
            if (c.block == 1) {
                std::memcpy(out, acc[s], width * 4);
            } else {
                for (int64_t b = 0; b < width; b += c.block) {
                    double total = c.block > kStrip ? wide[s] : 0.0;
                    for (int64_t i = b; i < std::min(b + c.block, width); ++i)
                        total = s == kMaxG ? larger((float)total, acc[s][i]) : total + acc[s][i];
                    if (c.block > kStrip) wide[s] = total;
                    out[b / c.block] = (float)total;
                }
            }
            out += work.n_partials;
        }
    }
}

SK_SIMD void gather(const Work& work, const Chunk& c) {
    const Descriptor& t = work.tensors[c.tensor];
    alignas(64) float w_tile[kTile], g_tile[kTile];
    double total[kStatistics] = {};
    for (int64_t i = 0; i < c.rows; i += kTile) {
        const int64_t n = std::min(kTile, c.rows - i);
        for (int64_t j = 0; j < n; ++j) {
            const int64_t at = work.members[c.row0 + i + j];
            w_tile[j] = *as_float(t.weight, t.weight_type, at, 1, w_tile + j);
            g_tile[j] = *as_float(t.grad, t.grad_type, at, 1, g_tile + j);
        }
        Vec sum[kStatistics] = {};
        add_tile(work.mask, w_tile, g_tile, n, sum);
        fold_all(work.mask, sum, total);
    }
    float* out = work.partials + c.partial0;
    for (int s = 0; s < kStatistics; ++s)
        if (work.mask >> s & 1) *out = (float)total[s], out += work.n_partials;
}

struct Finish {
    const int64_t* starts;
    const int32_t* order;  // null: the identity
    const float* partials;
    float *out, *running, *ema;
    int64_t n_partials, n_groups;
    float decay;
};

void finish(const Finish& f, int slot, bool largest, int64_t begin, int64_t end) {
    const float* partials = f.partials + slot * f.n_partials;
    for (int64_t j = begin; j < end; ++j) {
        double total = 0.0;
        for (int64_t i = f.starts[j]; i < f.starts[j + 1]; ++i) {
            const float p = partials[f.order ? f.order[i] : i];
            total = largest ? larger((float)total, p) : total + p;
        }
        const float sum = (float)total;
        const int64_t at = slot * f.n_groups + j;
        f.out[at] = sum;
        if (f.running) f.running[at] = largest ? larger(f.running[at], sum) : f.running[at] + sum;
        if (f.ema) f.ema[at] = f.decay * f.ema[at] + (1.0f - f.decay) * sum;
    }
}

float* float_data(const std::optional<Tensor>& t, const char* name, int64_t slots, int64_t groups) {
    if (!t) return nullptr;
    sk::check_cpu(*t, name);
    sk::check_dtype(*t, name, ScalarType::Float);
    sk::check_contiguous(*t, name);
    sk::check_dim(*t, name, 2);
    sk::check_size(*t, name, 0, slots);
    sk::check_size(*t, name, 1, groups);
    return static_cast<float*>(t->data_ptr());
}

// That no chunk, partial or group lies beyond its table; what a tensor holds only the caller knows.
void check_work(const Work& work, int64_t tensors, int64_t chunks, int64_t members) {
    for (int64_t i = 0; i < tensors; ++i) {
        sk::check_count(work.tensors[i].weight_type, "descriptors", 0, 2);
        sk::check_count(work.tensors[i].grad_type, "descriptors", 0, 2);
    }
    for (int64_t i = 0; i < chunks; ++i) {
        const Chunk& c = work.chunks[i];
        sk::check_count(c.kind, "chunks.kind", kRowSums, kGather);
        sk::check_count(c.tensor, "chunks.tensor", 0, tensors - 1);
        STD_TORCH_CHECK(
            c.row0 >= 0 && c.rows >= 0 && c.col0 >= 0 && c.cols >= 0 && c.block > 0 && c.pitch >= 0,
            "chunks: expected sizes >= 0 and a block > 0");
        const int64_t sums = c.kind == kRowSums      ? c.rows
                             : c.kind == kColumnSums ? (c.cols + c.block - 1) / c.block
                                                     : 1;
        sk::check_count(sums, "chunks.rows", 0, work.n_partials);
        sk::check_count(c.partial0, "chunks.partial0", 0, work.n_partials - sums);
        if (c.kind != kGather) continue;
        sk::check_count(c.rows, "chunks.rows", 0, members);
        sk::check_count(c.row0, "chunks.row0", 0, members - c.rows);
    }
}

void check_groups(const Finish& f, int64_t places) {
    unsigned down = 0;
    for (int64_t j = 0; j < f.n_groups; ++j) down |= f.starts[j + 1] < f.starts[j];
    const int64_t last = f.order ? places : f.n_partials;
    STD_TORCH_CHECK(down == 0 && f.starts[0] >= 0 && f.starts[f.n_groups] <= last,
                    "starts: expected offsets that rise from 0 to at most ", last);
    if (f.order) sk::check_index(f.order, places, "order", 0, f.n_partials);
}

void group_reduce(Tensor descriptors, Tensor chunks, Tensor starts, Tensor order, Tensor members,
                  int64_t statistics, Tensor partials, Tensor out, std::optional<Tensor> running,
                  std::optional<Tensor> ema, double decay) {
    for (const auto* t : {&descriptors, &chunks, &starts, &members, &order}) {
        sk::check_cpu(*t, "table");
        sk::check_dtype(*t, "table", t == &order ? ScalarType::Int : ScalarType::Long);
        sk::check_contiguous(*t, "table");
    }
    STD_TORCH_CHECK(starts.numel() > 0, "starts: expected at least one offset");
    sk::check_size(chunks, "chunks", 1, sizeof(Chunk) / 8);
    sk::check_size(descriptors, "descriptors", 1, sizeof(Descriptor) / 8);
    STD_TORCH_CHECK(statistics > 0 && statistics < 1 << kStatistics,
                    "statistics: expected bits of ", (int)kStatistics, " statistics, got ",
                    statistics);
    const unsigned mask = (unsigned)statistics;
    const int slots = __builtin_popcount(mask);
    const int64_t groups = starts.numel() - 1, n_partials = partials.size(1);
    float* scratch = float_data(partials, "partials", slots, n_partials);
    const Finish f{
        static_cast<const int64_t*>(starts.data_ptr()),
        order.numel() ? static_cast<const int32_t*>(order.data_ptr()) : nullptr,
        scratch,
        float_data(out, "out", slots, groups),
        float_data(running, "running", slots, groups),
        float_data(ema, "ema", slots, groups),
        n_partials,
        groups,
        (float)decay,
    };
    const Work work{
        static_cast<const Descriptor*>(descriptors.data_ptr()),
        static_cast<const Chunk*>(chunks.data_ptr()),
        static_cast<const int64_t*>(members.data_ptr()),
        scratch,
        n_partials,
        mask,
    };
    const int64_t n_chunks = chunks.size(0);
    check_work(work, descriptors.size(0), n_chunks, members.numel());
    check_groups(f, order.numel());
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), n_chunks);
    sk::for_each_in_ranges(n_chunks, threads, [&](int64_t, int64_t i) {
        const Chunk& c = work.chunks[i];
        if (c.kind == kRowSums)
            row_sums(work, c);
        else if (c.kind == kColumnSums)
            column_sums(work, c);
        else
            gather(work, c);
    });
    for (int s = 0, slot = 0; s < kStatistics; ++s) {
        if (!(mask >> s & 1)) continue;
        torch::stable::parallel_for(0, groups, 16384, [&](int64_t begin, int64_t end) {
            finish(f, slot, s == kMaxG, begin, end);
        });
        ++slot;
    }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sensikernels_native, m) {
    m.def(
        "group_reduce(Tensor descriptors, Tensor chunks, Tensor starts, Tensor order, "
        "Tensor members, int statistics, Tensor(a!) partials, Tensor(b!) out, "
        "Tensor(c!)? running, Tensor(d!)? ema, float decay) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CPU, m) {
    m.impl("group_reduce", TORCH_BOX(&group_reduce));
}
