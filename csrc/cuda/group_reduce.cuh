// Partial sums of chunks, then groups from partials: two launches for a whole model, no atomics.
// The work list is group_reduce/table.py's. Blocks stay resident and walk it; a warp takes a row or
// a block of columns, a thread block takes what is longer, so every order of addition is fixed.
#pragma once

#include "cuda/cpu_shim.h"

namespace sk::group_reduce {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp, kUnit = 8;

enum Statistic { kAbsWG, kWG, kWG2, kG2, kAbsG, kW2, kAbsW, kMaxG, kStatistics };
enum Kind : int64_t { kRowSums, kColumnSums, kGather };
enum Type : int64_t { kFloat, kBFloat16, kHalf };

struct Descriptor {
    int64_t weight, grad, weight_stride, grad_stride, weight_type, grad_type;
};

struct Chunk {
    int64_t kind, tensor, row0, rows, col0, cols, block, pitch, partial0;
};

struct Work {
    const Descriptor* tensors;
    const Chunk* chunks;
    const int64_t* members;
    float* partials;
    int64_t n_chunks, n_partials;
    unsigned mask;
};

struct Finish {
    const int64_t* starts;
    const int32_t* order;  // null: the identity
    const float* partials;
    float *out, *running, *ema;
    int64_t n_partials, n_groups;
    unsigned mask;
    float decay;
};

struct alignas(16) Words {
    uint32_t at[4];
};

// On magnitudes: the order of the bits is the order of the values, with NaN above infinity.
__device__ __forceinline__ float larger(float a, float b) {
    return __float_as_int(a) > __float_as_int(b) ? a : b;
}

__device__ __forceinline__ float half_bits(uint16_t bits) {
    return __half2float(__ushort_as_half(bits));
}

__device__ __forceinline__ float load_one(int64_t base, int64_t type, int64_t at) {
    if (type == kFloat) return reinterpret_cast<const float*>(base)[at];
    const uint16_t bits = reinterpret_cast<const uint16_t*>(base)[at];
    return type == kBFloat16 ? __uint_as_float((uint32_t)bits << 16) : half_bits(bits);
}

// Eight elements by 16-byte loads where they are aligned and all there; zeros past the end.
__device__ __forceinline__ void load_unit(int64_t base, int64_t type, int64_t at, int64_t n,
                                          float (&x)[kUnit]) {
    const int64_t address = base + at * (type == kFloat ? 4 : 2);
    if (n < kUnit || address % 16) {
#pragma unroll
        for (int i = 0; i < kUnit; ++i) x[i] = i < n ? load_one(base, type, at + i) : 0.0f;
        return;
    }
    const Words* words = reinterpret_cast<const Words*>(address);
    const Words first = words[0];
    if (type == kFloat) {
        const Words second = words[1];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[i] = __uint_as_float(first.at[i]);
            x[i + 4] = __uint_as_float(second.at[i]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t two = first.at[i];
            x[2 * i] = type == kBFloat16 ? __uint_as_float(two << 16) : half_bits(two & 0xffff);
            x[2 * i + 1] =
                type == kBFloat16 ? __uint_as_float(two & 0xffff0000u) : half_bits(two >> 16);
        }
    }
}

// Entries are added eight at a time and then merged, so that no chain of additions gets long.
struct Sums {
    float at[kStatistics];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int s = 0; s < kStatistics; ++s) at[s] = 0.0f;
    }

    __device__ __forceinline__ void add(float w, float g, unsigned mask) {
        const float p = w * g;
        if (mask & 1u << kAbsWG) at[kAbsWG] += fabsf(p);
        if (mask & 1u << kWG) at[kWG] += p;
        if (mask & 1u << kWG2) at[kWG2] += p * p;
        if (mask & 1u << kG2) at[kG2] += g * g;
        if (mask & 1u << kAbsG) at[kAbsG] += fabsf(g);
        if (mask & 1u << kW2) at[kW2] += w * w;
        if (mask & 1u << kAbsW) at[kAbsW] += fabsf(w);
        if (mask & 1u << kMaxG) at[kMaxG] = larger(at[kMaxG], fabsf(g));
    }

    __device__ __forceinline__ void merge(const Sums& other, unsigned mask) {
#pragma unroll
        for (int s = 0; s < kStatistics; ++s)
            if (mask >> s & 1)
                at[s] = s == kMaxG ? larger(at[s], other.at[s]) : at[s] + other.at[s];
    }

    __device__ __forceinline__ void over_warp(unsigned mask) {
#pragma unroll
        for (int s = 0; s < kStatistics; ++s) {
            if (!(mask >> s & 1)) continue;
            for (int lanes = kWarp / 2; lanes; lanes /= 2) {
                const float other = __shfl_xor_sync(~0u, at[s], lanes);
                at[s] = s == kMaxG ? larger(at[s], other) : at[s] + other;
            }
        }
    }

    __device__ __forceinline__ void store(const Work& work, int64_t partial) const {
        float* out = work.partials + partial;
#pragma unroll
        for (int s = 0; s < kStatistics; ++s)
            if (work.mask >> s & 1) *out = at[s], out += work.n_partials;
    }
};

// A warp, or a whole thread block: who adds up one partial sum.
template <bool whole_block>
struct Team {
    static constexpr int size = whole_block ? kThreads : kWarp;
    float (*shared)[kWarps];

    __device__ __forceinline__ int rank() const { return threadIdx.x % size; }
    __device__ __forceinline__ int first() const { return threadIdx.x / size; }
    __device__ __forceinline__ static constexpr int count() { return kThreads / size; }

    __device__ __forceinline__ void finish(Sums& sums, const Work& work, int64_t partial) const {
        sums.over_warp(work.mask);
        if (!whole_block) {
            if (rank() == 0) sums.store(work, partial);
            return;
        }
        const int warp = threadIdx.x / kWarp;
        if (threadIdx.x % kWarp == 0)
#pragma unroll
            for (int s = 0; s < kStatistics; ++s) shared[s][warp] = sums.at[s];
        __syncthreads();
        if (threadIdx.x == 0) {
#pragma unroll
            for (int s = 0; s < kStatistics; ++s)
                for (int i = 1; i < kWarps; ++i)
                    sums.at[s] =
                        s == kMaxG ? larger(sums.at[s], shared[s][i]) : sums.at[s] + shared[s][i];
            sums.store(work, partial);
        }
        __syncthreads();
    }
};

template <bool whole_block>
__device__ void row_sums(const Work& work, const Chunk& c, Team<whole_block> team) {
    const Descriptor t = work.tensors[c.tensor];
    const int64_t w_pitch = c.pitch ? c.pitch : t.weight_stride;
    const int64_t g_pitch = c.pitch ? c.pitch : t.grad_stride;
    for (int64_t r = team.first(); r < c.rows; r += team.count()) {
        const int64_t w0 = (c.row0 + r) * w_pitch + c.col0, g0 = (c.row0 + r) * g_pitch + c.col0;
        Sums sums;
        sums.clear();
#pragma unroll 2
        for (int64_t i = kUnit * team.rank(); i < c.cols; i += kUnit * team.size) {
            float w[kUnit], g[kUnit];
            load_unit(t.weight, t.weight_type, w0 + i, c.cols - i, w);
            load_unit(t.grad, t.grad_type, g0 + i, c.cols - i, g);
            Sums unit;
            unit.clear();
#pragma unroll
            for (int j = 0; j < kUnit; ++j) unit.add(w[j], g[j], work.mask);
            sums.merge(unit, work.mask);
        }
        team.finish(sums, work, c.partial0 + r);
    }
}

// One thread per column.
__device__ inline void single_columns(const Work& work, const Chunk& c) {
    const Descriptor t = work.tensors[c.tensor];
    const int64_t w_pitch = c.pitch ? c.pitch : t.weight_stride;
    const int64_t g_pitch = c.pitch ? c.pitch : t.grad_stride;
    for (int64_t i = threadIdx.x; i < c.cols; i += kThreads) {
        Sums sums;
        sums.clear();
        for (int64_t r0 = 0; r0 < c.rows; r0 += kUnit) {
            Sums unit;
            unit.clear();
#pragma unroll 4
            for (int64_t r = c.row0 + r0; r < c.row0 + min(c.rows, r0 + kUnit); ++r)
                unit.add(load_one(t.weight, t.weight_type, r * w_pitch + c.col0 + i),
                         load_one(t.grad, t.grad_type, r * g_pitch + c.col0 + i), work.mask);
            sums.merge(unit, work.mask);
        }
        sums.store(work, c.partial0 + i);
    }
}

template <bool whole_block>
__device__ void column_blocks(const Work& work, const Chunk& c, Team<whole_block> team) {
    const Descriptor t = work.tensors[c.tensor];
    const int64_t w_pitch = c.pitch ? c.pitch : t.weight_stride;
    const int64_t g_pitch = c.pitch ? c.pitch : t.grad_stride;
    const int64_t blocks = (c.cols + c.block - 1) / c.block;
    for (int64_t b = team.first(); b < blocks; b += team.count()) {
        const int64_t col0 = c.col0 + b * c.block;
        const int64_t wide = min(c.block, c.cols - b * c.block);
        const int64_t down = team.size / wide, right = team.size % wide;
        Sums sums;
        sums.clear();
        int64_t row = team.rank() / wide, col = team.rank() % wide;
        while (row < c.rows) {
            Sums unit;
            unit.clear();
            for (int j = 0; j < kUnit && row < c.rows; ++j) {
                unit.add(load_one(t.weight, t.weight_type, (c.row0 + row) * w_pitch + col0 + col),
                         load_one(t.grad, t.grad_type, (c.row0 + row) * g_pitch + col0 + col),
                         work.mask);
                row += down;
                col += right;
                if (col >= wide) col -= wide, ++row;
            }
            sums.merge(unit, work.mask);
        }
        team.finish(sums, work, c.partial0 + b);
    }
}

__device__ inline void gather(const Work& work, const Chunk& c, Team<true> team) {
    const Descriptor t = work.tensors[c.tensor];
    Sums sums;
    sums.clear();
    for (int64_t i = threadIdx.x; i < c.rows; i += kThreads) {
        const int64_t at = work.members[c.row0 + i];
        sums.add(load_one(t.weight, t.weight_type, at), load_one(t.grad, t.grad_type, at),
                 work.mask);
    }
    team.finish(sums, work, c.partial0);
}

static __global__ void __launch_bounds__(kThreads, 2) reduce_chunks(Work work) {
    SK_SHARED(float, shared, [kStatistics][kWarps]);
    const Team<false> warp{shared};
    const Team<true> block{shared};
    for (int64_t i = blockIdx.x; i < work.n_chunks; i += gridDim.x) {
        const Chunk c = work.chunks[i];
        if (c.kind == kGather)
            gather(work, c, block);
        else if (c.kind == kRowSums && c.rows >= kWarps)
            row_sums(work, c, warp);
        else if (c.kind == kRowSums)
            row_sums(work, c, block);
        else if (c.block == 1)
            single_columns(work, c);
        else if (c.cols >= kWarps * c.block)
            column_blocks(work, c, warp);
        else
            column_blocks(work, c, block);
    }
}

// One statistic of one group per team of `lanes`; grid (groups, statistics).
template <int lanes>
__global__ void __launch_bounds__(kThreads) finish_groups(Finish f) {
    const int slot = blockIdx.y, lane = threadIdx.x % lanes;
    const bool largest = f.mask >> kMaxG & 1 && slot == gridDim.y - 1;
    const float* partials = f.partials + slot * f.n_partials;
    const int64_t j = ((int64_t)blockIdx.x * kThreads + threadIdx.x) / lanes;
    const bool valid = j < f.n_groups;
    double total = 0.0;
    float most = 0.0f;
    for (int64_t i = valid ? f.starts[j] + lane : 0; valid && i < f.starts[j + 1]; i += lanes) {
        const float p = partials[f.order ? f.order[i] : i];
        if (largest)
            most = larger(most, p);
        else
            total += p;
    }
    for (int width = lanes / 2; width; width /= 2) {
        total += __shfl_xor_sync(~0u, total, width);
        most = larger(most, __shfl_xor_sync(~0u, most, width));
    }
    if (!valid || lane) return;
    const float sum = largest ? most : (float)total;
    const int64_t at = slot * f.n_groups + j;
    f.out[at] = sum;
    if (f.running) f.running[at] = largest ? larger(f.running[at], sum) : f.running[at] + sum;
    if (f.ema) f.ema[at] = f.decay * f.ema[at] + (1.0f - f.decay) * sum;
}

inline void launch(const Work& work, const Finish& f, int resident, cudaStream_t stream) {
    const int slots = __builtin_popcount(f.mask);
    if (work.n_chunks > 0) {
        const unsigned grid = (unsigned)(work.n_chunks < resident ? work.n_chunks : resident);
        SK_LAUNCH(reduce_chunks, dim3(grid), dim3(kThreads), 0, stream, work);
    }
    if (f.n_groups == 0) return;
    const bool many = f.n_partials > 4 * f.n_groups;
    const int64_t threads = f.n_groups * (many ? kWarp : 1);
    const dim3 grid((unsigned)((threads + kThreads - 1) / kThreads), (unsigned)slots);
    if (many)
        SK_LAUNCH((finish_groups<kWarp>), grid, dim3(kThreads), 0, stream, f);
    else
        SK_LAUNCH((finish_groups<1>), grid, dim3(kThreads), 0, stream, f);
}

}  // namespace sk::group_reduce
