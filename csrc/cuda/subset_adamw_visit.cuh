// Where the kept entries of an item are, for every kind: a warp walks a chunk line by line.
//
// A visitor has .run(param, grad, state, n), a line of a warp; .one(param, grad, state, kept), an
// entry of a lane; .begin_row(row) and .end_row(row). Each is called from as few places as can be:
// they are inlined, and ptxas takes minutes over a kernel with dozens of copies. Rows are whole
// where they are summed or touched; elsewhere begin and end mean nothing.
#pragma once

#include "cuda/cpu_shim.h"
//
#include "subset_adamw.h"

namespace sk::subset_adamw {

constexpr int kThreads = 256, kWarp = 32;
constexpr int kWindow = 32 * kWarp;  // entries whose bits a warp unpacks at once

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

// Bits of entries [e, e + 32) that are before `stop`.
__device__ __forceinline__ unsigned word_of(const uint8_t* bits, int64_t e, int64_t stop) {
    unsigned long long word = 0;
    for (int j = 0; j < 5; ++j)
        if ((e >> 3) * 8 + 8 * j < stop) word |= 1ull * bits[(e >> 3) + j] << 8 * j;
    const unsigned found = static_cast<unsigned>(word >> (e & 7));
    return stop - e >= 32 ? found : stop > e ? found & ((1u << (stop - e)) - 1) : 0;
}

// Kept entries before `start`, counted by a warp from its span's offset.
__device__ __forceinline__ int64_t rank_of(const Item& item, int64_t start, int lane) {
    const auto* bits = static_cast<const uint8_t*>(item.index);
    int before = 0;
    for (int64_t e = start / kSpan * kSpan + 32 * lane; e < start; e += kWindow)
        before += __popc(word_of(bits, e, start));
    return item.offsets[start / kSpan] + warp_sum(before);
}

// The first of `units` that is not below `least`.
__device__ __forceinline__ int64_t first_not_below(const int32_t* index, int64_t units,
                                                   int64_t least) {
    int64_t found = 0;
    while (units > 0) {
        const int64_t half = units / 2;
        const bool below = index[found + half] < least;
        found = below ? found + half + 1 : found;
        units = below ? units - half - 1 : half;
    }
    return found;
}

// Whole rows, or blocks that no row is summed over: lines of contiguous entries. An index past the
// last unit is padding.
template <class Visitor>
__device__ __forceinline__ void visit_runs(const Item& item, int64_t first, int64_t end, bool sums,
                                           Visitor& visitor) {
    const auto* index = static_cast<const int32_t*>(item.index);
    const int64_t kind = item.kind, wide = item.columns;
    const bool blocks = kind == kBlocks, single = kind == kAll && !sums;
    // A row has fewer than 2^32 entries; a 64-bit division would be a call.
    const unsigned width = blocks ? static_cast<unsigned>(item.block_columns) : 1;
    const unsigned across = static_cast<unsigned>(wide) / width;
    const int64_t lines = blocks ? item.block_rows : 1;
    const int64_t n = single ? end - first : blocks ? width : wide;
    const int64_t all = blocks ? item.rows / lines * across : item.rows;
    for (int64_t u = first; u < (single ? first + 1 : end); ++u) {
        int64_t row = kind == kAll ? u : index[u];
        if (row < 0 || (row >= all && !single)) continue;  // no row, or room for more of them
        int64_t param = single ? first : row * wide;
        if (blocks) {
            const unsigned block = static_cast<unsigned>(row);
            row = block / across;
            param = row * lines * wide + (block - row * across) * width;
        }
        const bool touched = kind == kTouched, compact = kind == kRows || blocks;
        int64_t state = compact ? u * lines * n : param;
        if (touched) visitor.begin_row(row);
        for (int64_t i = 0; i < lines; ++i, param += wide, state += n)
            visitor.run(param, touched ? u * wide : param, state, n);
        visitor.end_row(row);
    }
}

// Columns, or blocks row by row.
template <class Visitor>
__device__ __forceinline__ void visit_gathered(const Item& item, int64_t first, int64_t end,
                                               int lane, Visitor& visitor) {
    const auto* index = static_cast<const int32_t*>(item.index);
    const bool blocks = item.kind == kBlocks;
    const int64_t wide = item.columns, units = item.units, high = blocks ? item.block_rows : 1;
    const unsigned width = blocks ? static_cast<unsigned>(item.block_columns) : 1;
    const unsigned across = static_cast<unsigned>(wide) / width;
    int64_t u = 0, next = blocks ? first_not_below(index, units, first * across) : units;
    for (int64_t b = first; b < end; ++b) {
        const int64_t origin = blocks ? b * across : 0;
        if (blocks) u = next;
        while (next < units && index[next] < origin + across) ++next;
        const unsigned n = static_cast<unsigned>(next - u) * width;
        for (int64_t i = 0; i < high; ++i) {
            const int64_t row = b * high + i;
            for (unsigned j = lane; j < n; j += kWarp) {
                const unsigned unit = width == 1 ? j : j / width, column = j - unit * width;
                const int64_t place = index[u + unit] - origin;
                if (place < 0 || place >= across) continue;  // no column
                const int64_t param = row * wide + place * width + column;
                const int64_t state =
                    blocks ? ((u + unit) * high + i) * width + column : row * units + j;
                visitor.one(param, param, state, true);
            }
            visitor.end_row(row);
        }
    }
}

// Bits: a warp unpacks a window of them into a list, so that no lane waits for a frozen entry.
template <class Visitor>
__device__ __forceinline__ void visit_elements(const Item& item, int64_t first, int64_t end,
                                               bool sums, int lane, Visitor& visitor) {
    SK_SHARED(uint16_t, lists, [kThreads / kWarp][kWindow]);
    uint16_t* list = lists[threadIdx.x / kWarp];
    const auto* bits = static_cast<const uint8_t*>(item.index);
    const int64_t unit = sums ? item.columns : kSpan, numel = item.rows * item.columns;
    int64_t rank = rank_of(item, first * unit, lane);
    for (int64_t u = first; u < end; ++u) {
        const int64_t stop = u * unit + unit < numel ? u * unit + unit : numel;
        for (int64_t base = u * unit; base < stop; base += kWindow) {
            unsigned word = word_of(bits, base + 32 * lane, stop);
            const int own = __popc(word);
            int upto = own;  // found by this lane and those before it
            for (int lanes = 1; lanes < kWarp; lanes *= 2) {
                const int other = __shfl_up_sync(~0u, upto, lanes);
                if (lane >= lanes) upto += other;
            }
            const int found = __shfl_sync(~0u, upto, kWarp - 1);
            for (int at = upto - own; word; word &= word - 1)
                list[at++] = static_cast<uint16_t>(32 * lane + __ffs(word) - 1);
            __syncwarp();
            for (int i = lane; i < found; i += kWarp)
                visitor.one(base + list[i], base + list[i], rank + i, true);
            __syncwarp();
            rank += found;
        }
        visitor.end_row(u);
    }
}

// Every entry, with a gradient where its bit is set.
template <class Visitor>
__device__ __forceinline__ void visit_masked(const Item& item, int64_t first, int64_t end,
                                             bool sums, int lane, Visitor& visitor) {
    const auto* bits = static_cast<const uint8_t*>(item.index);
    const int64_t unit = sums ? item.columns : kSpan, numel = item.rows * item.columns;
    for (int64_t u = first; u < end; ++u) {
        const int64_t stop = u * unit + unit < numel ? u * unit + unit : numel;
        for (int64_t e = u * unit + lane; e < stop; e += kWarp)
            visitor.one(e, e, e, bits[e >> 3] >> (e & 7) & 1);
        visitor.end_row(u);
    }
}

template <class Visitor>
__device__ __forceinline__ void visit(const Item& item, int64_t first, int64_t end, int lane,
                                      Visitor& visitor) {
    const bool sums = item.sums() && item.columns > 1;
    if (item.kind == kElements) {
        visit_elements(item, first, end, sums, lane, visitor);
    } else if (item.kind == kMasked) {
        visit_masked(item, first, end, sums, lane, visitor);
    } else if (item.kind == kColumns || (item.kind == kBlocks && sums)) {
        visit_gathered(item, first, end, lane, visitor);
    } else {
        visit_runs(item, first, end, sums, visitor);
    }
}

}  // namespace sk::subset_adamw
