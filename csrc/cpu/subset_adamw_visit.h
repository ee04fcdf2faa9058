// Where the kept entries of an item are, for every kind.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/subset_adamw_bits.h"
#include "subset_adamw.h"

namespace sk::subset_adamw {

constexpr int64_t kBlock = 1024;          // entries of a piece, which fits in L1: spans of bits too
constexpr int64_t kGatherBelow = 16;      // of so many columns one is kept: bits cost more
constexpr int64_t kStaged = kBlock + 16;  // `compress` goes beyond the last entry

// The entries of a piece: a run, what `index` or the `bits` of `span` entries name, or runs of
// `width` entries `stride` apart.
struct Pick {
    const int32_t* index = nullptr;  // relative to the origin
    const uint8_t* bits = nullptr;
    int64_t span = 0;
    int64_t width = 0, stride = 0;
    int64_t ahead = 0;  // entries from here to the next piece, if that is not what follows

    explicit operator bool() const { return index || bits || width; }
};

inline Pick named(const int32_t* index, int64_t ahead = 0) {
    Pick pick;
    pick.index = index;
    pick.ahead = ahead;
    return pick;
}

// Lists which of `n` entries from `from` on have their bit set; the first has bit 0 of its byte.
inline int64_t list_bits(const uint8_t* bits, int64_t n, int64_t from, int32_t* list) {
    int64_t found = 0;
    for (int64_t i = 0; i < n; i += 64)  // one branch missed per word, not per byte
        for (uint64_t word = bits_of(bits + i / 8, n - i); word; word &= word - 1)
            list[found++] = static_cast<int32_t>(from + i + __builtin_ctzll(word));
    return found;
}

// Visits kept entries in pieces of at most kBlock: `piece(param, grad, state, pick, n)` gets
// offsets of their origin. `row_done(row)` follows the last piece of a row where rows are summed.
template <class Piece, class RowDone>
void visit(const Item& item, int64_t first, int64_t end, Piece&& piece, RowDone&& row_done) {
    const auto* index = static_cast<const int32_t*>(item.index);
    const int64_t wide = item.columns;
    const bool sums = item.sums() && wide > 1;
    const auto run = [&](int64_t param, int64_t grad, int64_t state, int64_t n, int64_t next = 0) {
        for (int64_t i = 0; i < n; i += kBlock) {
            Pick pick;
            pick.ahead = i + kBlock < n || !next ? kBlock : next - i;
            piece(param + i, grad + i, state + i, pick, std::min(kBlock, n - i));
        }
    };
    // The kept entries among n, by the bits of all of them; the first has the bit 0 of its byte.
    const auto flagged = [&](int64_t origin, int64_t state, const uint8_t* bits, int64_t n) {
        for (int64_t i = 0; i < n; i += kBlock) {
            Pick pick;
            pick.bits = bits + i / 8;
            pick.span = std::min(kBlock, n - i);
            const int64_t found = count_bits(pick.bits, pick.span);
            if (found) piece(origin + i, origin + i, state, pick, found);
            state += found;
        }
        return state;
    };
    // Entrywise sums need the index.
    const bool by_bits = has_compress() && !(item.sums() && wide == 1);
    switch (item.kind) {
        case kAll:
            if (!sums) return run(first, first, first, end - first);
            for (int64_t r = first; r < end; ++r) {
                run(r * wide, r * wide, r * wide, wide);
                row_done(r);
            }
            return;
        case kRows:
            if (wide == 1) {
                for (int64_t u = first; u < end; u += kBlock)
                    piece(0, 0, u, named(index + u), std::min(kBlock, end - u));
                return;
            }
            for (int64_t u = first; u < end;) {
                const int64_t row = index[u];
                int64_t next = u + 1;
                if (!sums)
                    while (next < end && index[next] == row + (next - u)) ++next;
                const int64_t ahead = next < end ? (index[next] - row) * wide : 0;
                run(row * wide, row * wide, u * wide, (next - u) * wide, ahead);
                row_done(row);
                u = next;
            }
            return;
        case kTouched:
            for (int64_t u = first; u < end; ++u) {
                const int64_t row = index[u];
                if (row < 0) continue;
                run(row * wide, u * wide, row * wide, wide);
                row_done(row);
            }
            return;
        case kColumns: {
            // As many rows at a time as fill a piece.
            const int64_t units = item.units;
            const bool flags = by_bits && units * kGatherBelow >= wide;
            const int64_t fit = std::min(kBlock / (flags ? wide : units), INT32_MAX / wide);
            const int64_t rows = sums ? 1 : std::clamp<int64_t>(fit, 1, end - first);
            std::vector<uint8_t> bits(flags ? (rows * wide + 7) / 8 : 0);
            std::vector<int32_t> places;
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t i = 0; i < units; ++i) {
                    const int64_t entry = r * wide + index[i];
                    if (flags) {
                        bits[entry / 8] |= static_cast<uint8_t>(1 << entry % 8);
                    } else {
                        places.push_back(static_cast<int32_t>(entry));
                    }
                }
            for (int64_t r = first; r < end; r += rows) {
                const int64_t now = std::min(rows, end - r), n = now * units;
                if (flags) flagged(r * wide, r * units, bits.data(), now * wide);
                for (int64_t i = 0; i < n && !flags; i += kBlock)
                    piece(r * wide, r * wide, r * units + i, named(places.data() + i, rows * wide),
                          std::min(kBlock, n - i));
                row_done(r);
            }
            return;
        }
        case kBlocks: {
            const int64_t across = wide / item.block_columns, high = item.block_rows;
            if (!sums) {
                const int64_t width = item.block_columns, fit = kBlock / width;
                for (int64_t u = first; u < end; ++u)
                    for (int64_t i = 0; i < high; i += std::max<int64_t>(fit, 1)) {
                        const int64_t place =
                            (index[u] / across * high + i) * wide + index[u] % across * width;
                        const int64_t state = (u * high + i) * width;
                        if (fit < 2) {
                            run(place, place, state, width);
                            continue;
                        }
                        Pick rows;
                        rows.width = width;
                        rows.stride = wide;
                        if (u + 1 < end)
                            rows.ahead = (index[u + 1] / across * high + i) * wide +
                                         index[u + 1] % across * width - place;
                        piece(place, place, state, rows, std::min(fit, high - i) * width);
                    }
                return;
            }
            const auto* stop = index + item.units;
            const auto* u = std::lower_bound(index, stop, first * across);
            for (int64_t b = first; b < end; ++b) {
                const auto* next = std::lower_bound(u, stop, (b + 1) * across);
                for (int64_t i = 0; i < high && u != next; ++i) {
                    for (const auto* block = u; block != next; ++block) {
                        const int64_t place =
                            (b * high + i) * wide + *block % across * item.block_columns;
                        run(place, place, ((block - index) * high + i) * item.block_columns,
                            item.block_columns);
                    }
                    row_done(b * high + i);
                }
                u = next;
            }
            return;
        }
        default:
            break;
    }
    const auto* bits = static_cast<const uint8_t*>(item.index);
    const auto kept = [&](int64_t entry) { return bits[entry >> 3] >> (entry & 7) & 1; };
    const int64_t unit = sums ? wide : kSpan;
    const int64_t stop = std::min(end * unit, item.rows * wide);
    int64_t rank = 0;
    if (item.kind == kElements && first * unit < stop) {
        const int64_t start = first * unit, span = start / kSpan;
        rank = item.offsets[span];
        for (int64_t e = span * kSpan; e < start;) {
            if (e % 8 == 0 && e + 8 <= start) {
                rank += __builtin_popcount(bits[e >> 3]);
                e += 8;
            } else {
                rank += kept(e++);
            }
        }
    }
    int32_t list[kBlock];
    const bool whole = by_bits && item.kind == kElements && unit % 8 == 0;
    if (whole && !sums) {
        flagged(first * unit, rank, bits + first * unit / 8, stop - first * unit);
        return;
    }
    for (int64_t begin = first * unit; begin < stop; begin += unit) {
        const int64_t limit = std::min(begin + unit, stop);
        if (whole) rank = flagged(begin, rank, bits + begin / 8, limit - begin);
        for (int64_t e = begin; e < limit && !whole; e += kBlock) {
            const int64_t n = std::min(kBlock, limit - e);
            if (item.kind == kMasked) {
                piece(e, e, e, Pick{}, n);
                continue;
            }
            int64_t found = 0, i = 0;
            for (; i < n && (e + i) % 8; ++i) {
                list[found] = static_cast<int32_t>(i);
                found += kept(e + i);
            }
            found += list_bits(bits + (e + i) / 8, n - i, i, list + found);
            if (found) piece(e, e, rank, named(list), found);
            rank += found;
        }
        if (sums) row_done(begin / wide);
    }
}

}  // namespace sk::subset_adamw
