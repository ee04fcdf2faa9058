// Where the kept entries of an item are, for every kind: a warp walks a chunk line by line.
#pragma once

#include "cuda/cpu_shim.h"
//
#include "subset_adamw.h"

namespace sk::subset_adamw {

constexpr int kThreads = 256, kWarp = 32;

template <class T>
__device__ __forceinline__ float widen(T value) {
    return static_cast<float>(value);
}

template <class T>
struct alignas(4 * sizeof(T)) Four {
    T at[4];
};

template <class T>
__device__ __forceinline__ bool aligned(const T* p) {
    return reinterpret_cast<uintptr_t>(p) % sizeof(Four<T>) == 0;
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
    for (int lanes = kWarp / 2; lanes; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
    return value;
}

__device__ __forceinline__ bool bit(const uint8_t* bits, int64_t entry) {
    return bits[entry >> 3] >> (entry & 7) & 1;
}

// Kept entries before `start`, counted by a warp from its span's offset.
__device__ __forceinline__ int64_t rank_of(const Item& item, int64_t start, int lane) {
    const auto* bits = static_cast<const uint8_t*>(item.index);
    int before = 0;
    for (int64_t e = start / kSpan * kSpan + 8 * lane; e < start; e += 8 * kWarp) {
        unsigned byte = bits[e >> 3];
        if (start - e < 8) byte &= (1u << (start - e)) - 1;
        before += __popc(byte);
    }
    return item.offsets[start / kSpan] + warp_sum(before);
}

// Calls visitor.begin_row(row), .run(param, grad, state, n), .gathered(param, state, index, n),
// .entry(param, state, live) and .end_row(row) for the kept entries of units [first, end). Rows are
// whole where they are summed or touched; elsewhere begin and end may be missing.
template <class Visitor>
__device__ __forceinline__ void visit(const Item& item, int64_t first, int64_t end, int lane,
                                      Visitor& visitor) {
    const auto* index = static_cast<const int32_t*>(item.index);
    const int64_t wide = item.columns;
    const bool sums = item.sums() && wide > 1;
    switch (item.kind) {
        case kAll:
            if (!sums) return visitor.run(first, first, first, end - first);
            for (int64_t r = first; r < end; ++r) {
                visitor.run(r * wide, r * wide, r * wide, wide);
                visitor.end_row(r);
            }
            return;
        case kRows:
            for (int64_t u = first; u < end; ++u) {
                const int64_t row = index[u];
                visitor.run(row * wide, row * wide, u * wide, wide);
                visitor.end_row(row);
            }
            return;
        case kTouched:
            for (int64_t u = first; u < end; ++u) {
                const int64_t row = index[u];
                if (row < 0) continue;
                visitor.begin_row(row);
                visitor.run(row * wide, u * wide, row * wide, wide);
                visitor.end_row(row);
            }
            return;
        case kColumns:
            for (int64_t r = first; r < end; ++r) {
                visitor.gathered(r * wide, r * item.units, index, item.units);
                visitor.end_row(r);
            }
            return;
        case kBlocks: {
            // A row has fewer than 2^32 entries; a 64-bit division would be a call.
            const unsigned width = static_cast<unsigned>(item.block_columns);
            const unsigned across = static_cast<unsigned>(wide) / width;
            const int64_t high = item.block_rows;
            if (!sums) {
                for (int64_t u = first; u < end; ++u) {
                    const unsigned block = index[u], row = block / across;
                    int64_t place = row * high * wide + (block - row * across) * width;
                    for (int64_t i = 0; i < high; ++i, place += wide)
                        visitor.run(place, place, (u * high + i) * width, width);
                }
                return;
            }
            int64_t u = 0;
            for (int64_t n = item.units; n > 0;) {  // the first block at or after row `first`
                const int64_t half = n / 2;
                const bool below = index[u + half] < first * across;
                u = below ? u + half + 1 : u;
                n = below ? n - half - 1 : half;
            }
            for (int64_t b = first; b < end; ++b) {
                int64_t next = u;
                while (next < item.units && index[next] < (b + 1) * across) ++next;
                for (int64_t i = 0; i < high && next > u; ++i) {
                    for (int64_t v = u; v < next; ++v) {
                        const int64_t place =
                            (b * high + i) * wide + (index[v] - b * across) * width;
                        visitor.run(place, place, (v * high + i) * width, width);
                    }
                    visitor.end_row(b * high + i);
                }
                u = next;
            }
            return;
        }
        default:
            break;
    }
    const auto* bits = static_cast<const uint8_t*>(item.index);
    const int64_t unit = sums ? wide : kSpan, numel = item.rows * wide;
    for (int64_t u = first; u < end; ++u) {
        const int64_t begin = u * unit, stop = begin + unit < numel ? begin + unit : numel;
        const bool masked = item.kind == kMasked;
        int64_t rank = masked ? 0 : rank_of(item, begin, lane);
        for (int64_t base = begin; base < stop; base += kWarp) {
            const int64_t e = base + lane;
            const bool set = e < stop && bit(bits, e);
            if (masked) {
                visitor.entry(e, e, e < stop, set);
                continue;
            }
            const unsigned votes = __ballot_sync(~0u, set);
            visitor.entry(e, rank + __popc(votes & ((1u << lane) - 1)), set, true);
            rank += __popc(votes);
        }
        if (sums) visitor.end_row(u);
    }
}

}  // namespace sk::subset_adamw
