// One head of one sequence of varlen_attention.cpp, forward and backward; included there only.
#pragma once

#include "cpu/varlen_attention_pairs.h"
#include "cpu/varlen_attention_rows.h"

#include <vector>

namespace {

// Matrices of a thread's scratch, each on a cache line.
class Scratch {
  public:
    explicit Scratch(int64_t floats) {
        thread_local std::vector<float> block;  // reused: fresh pages cost more than a short head
        if (static_cast<int64_t>(block.size()) < floats + kLanes) block.resize(floats + kLanes);
        at_ = block.data() + (64 - reinterpret_cast<uintptr_t>(block.data()) % 64) % 64 / 4;
    }
    float* cut(int64_t rows, int64_t length) {
        float* const at = at_;
        at_ += rows * length;
        return at;
    }

  private:
    float* at_;
};

// Bring rows that are soon read, or written, closer while others are computed.
template <int write>
void prefetch(const Rows& rows, int64_t n) {
    const int64_t size = rows.bf16 ? 2 : 4, bytes = rows.width * size;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t at = 0; at < bytes; at += 64)
            __builtin_prefetch(rows.base + i * rows.stride * size + at, write);
}

struct Sizes {
    int64_t queries, keys;  // of one sequence; of the longest one, for scratch
    int64_t qk, vo;         // row lengths of packed q and k, of packed v
    float scale;
    int64_t window;  // queries and keys farther apart do not meet

    bool windowed() const { return window < std::max(queries, keys) - 1; }
    // The keys that the query rows from `first` to `first + n` meet.
    Band band(int64_t first, int64_t n) const {
        if (!windowed()) return Band::whole(keys);
        const int64_t begin = std::max<int64_t>(first - window, 0) / kLanes * kLanes;
        const int64_t end = std::min(keys, first + n + window);
        if (begin >= end) return {0, 0, 0, window};
        return {begin, end - begin, first - begin, window};
    }
    // Row length of scores of the largest band.
    int64_t across() const {
        return row_length(windowed() ? std::min(keys, kRows + 2 * window + kLanes) : keys);
    }
    int64_t rows() const { return std::min(kRows, padded(queries)); }
    int64_t scores() const { return row_length(keys); }
    int64_t floats() const {
        const int64_t rows = this->rows(), keys = padded(this->keys);
        return (2 * rows + qk + vo) * scores() + rows * scores() + 3 * (keys + rows) * (qk + vo) +
               2 * kRows;
    }
};

// Words of as many elements, in whole vectors; terms of a sum over them.
template <class Kind>
int64_t words(int64_t n) {
    return padded(ceil_div(n, Kind::per_word));
}
template <class Kind>
int64_t terms(int64_t n) {
    return ceil_div(n, Kind::per_word);
}

// A head's operands and results; rows start at its sequence's first.
struct Head {
    Rows q, k, v, out;  // out: dO in backward
    Rows dq, dk, dv;    // backward only
    float* logsumexp;   // forward only
};

template <class Kind>
void forward_head(const Head& h, const Sizes& size, const Drop& drop, Scratch scratch) {
    const int64_t keys = size.keys, length = size.scores(), all = padded(keys), rows = size.rows();
    const int64_t qk = words<Kind>(h.q.width), vo = words<Kind>(h.v.width), across = size.across();
    float* const kt = scratch.cut(qk, length);
    float* const packed_v = scratch.cut(all, vo);
    float* const packed_k = scratch.cut(all, std::max(qk, size.vo));
    float* const queries = scratch.cut(rows, qk);
    float* const p = scratch.cut(rows, across);
    float* const narrowed = scratch.cut(rows, across / 2);
    float* const out = scratch.cut(rows, size.vo);
    float* const inverse = scratch.cut(1, kRows);
    Kind::load_rows(h.k, keys, all, packed_k, qk);
    transpose(packed_k, qk, keys, terms<Kind>(h.k.width), kt, length);
    Kind::load_rows(h.v, keys, all, packed_v, vo);
    // Over packed_k, which is transposed by now.
    const float* const values = Kind::right(packed_v, vo, all, h.v.width, packed_k, size.vo);
    for (int64_t first = 0; first < size.queries; first += kRows) {
        const int64_t n = std::min(kRows, size.queries - first);
        const Band band = size.band(first, n);
        Kind::load_rows(h.q.at(first), n, n, queries, qk);
        prefetch<1>(h.out.at(first), n);
        Kind::multiply(Left{queries, qk, 1}, n, kt + band.begin, length, p, across, band.columns,
                       terms<Kind>(h.q.width), false);
        softmax(p, across, n, band, size.scale, drop, first, inverse, h.logsumexp + first);
        Kind::multiply(Kind::left(p, across, n, band.columns, narrowed), n,
                       values + band.begin / Kind::per_word * size.vo, size.vo, out, size.vo,
                       h.v.width, terms<Kind>(band.columns), false);
        write_rows(out, size.vo, n, inverse, drop.rate, h.out.at(first));
    }
}

template <class Kind>
void backward_head(const Head& h, const Sizes& size, const Drop& drop, Scratch scratch) {
    const int64_t keys = size.keys, length = size.scores(), all = padded(keys), rows = size.rows();
    const int64_t qk = words<Kind>(h.q.width), vo = words<Kind>(h.v.width), across = size.across();
    float* const kt = scratch.cut(qk, length);
    float* const vt = scratch.cut(vo, length);
    float* const packed_k = scratch.cut(all, qk);
    float* const packed_v = scratch.cut(all, vo);
    float* const dk = scratch.cut(all, size.qk);
    float* const dv = scratch.cut(all, size.vo);
    float* const packed_q = scratch.cut(rows, qk);
    float* const packed_d = scratch.cut(rows, vo);
    float* const right_q = scratch.cut(rows, size.qk);
    float* const right_d = scratch.cut(rows, size.vo);
    float* const dq = scratch.cut(rows, size.qk);
    float* const p = scratch.cut(rows, across);
    float* const g = scratch.cut(rows, across);
    float* const narrowed = scratch.cut(rows, across / 2);
    Kind::load_rows(h.v, keys, all, packed_v, vo);
    transpose(packed_v, vo, keys, terms<Kind>(h.v.width), vt, length);
    Kind::load_rows(h.k, keys, all, packed_k, qk);
    transpose(packed_k, qk, keys, terms<Kind>(h.k.width), kt, length);
    const float* const right_k =
        Kind::right(packed_k, qk, all, h.k.width, scratch.cut(all, size.qk), size.qk);
    prefetch<1>(h.dk, std::min(kRows, keys));
    prefetch<1>(h.dv, std::min(kRows, keys));
    // Otherwise the first rows write all of both.
    const bool cleared = size.queries == 0 || size.windowed();
    if (cleared) {
        std::memset(dk, 0, static_cast<size_t>(keys) * size.qk * 4);
        std::memset(dv, 0, static_cast<size_t>(keys) * size.vo * 4);
    }
    for (int64_t first = 0; first < size.queries; first += kRows) {
        const int64_t n = std::min(kRows, size.queries - first), even = n + n % 2;
        const bool more = cleared || first > 0;
        const Band band = size.band(first, n);
        const int64_t columns = band.columns;
        Kind::load_rows(h.q.at(first), n, even, packed_q, qk);
        Kind::load_rows(h.out.at(first), n, even, packed_d, vo);
        const float* const q = Kind::right(packed_q, qk, even, h.q.width, right_q, size.qk);
        const float* const d = Kind::right(packed_d, vo, even, h.v.width, right_d, size.vo);
        Kind::multiply(Left{packed_q, qk, 1}, n, kt + band.begin, length, p, across, columns,
                       terms<Kind>(h.q.width), false);
        prefetch<1>(h.dq.at(first), n);
        Kind::multiply(Left{packed_d, vo, 1}, n, vt + band.begin, length, g, across, columns,
                       terms<Kind>(h.v.width), false);
        softmax_backward(p, g, across, n, band, size.scale, drop, first);
        Kind::multiply(Kind::left(g, across, n, columns, narrowed), n,
                       right_k + band.begin / Kind::per_word * size.qk, size.qk, dq, size.qk,
                       h.q.width, terms<Kind>(columns), false);
        write_rows(dq, size.qk, n, nullptr, 1.0f, h.dq.at(first));
        Kind::multiply(Kind::turned(g, across, n, columns), columns, q, size.qk,
                       dk + band.begin * size.qk, size.qk, h.k.width, terms<Kind>(n), more);
        Kind::multiply(Kind::turned(p, across, n, columns), columns, d, size.vo,
                       dv + band.begin * size.vo, size.vo, h.v.width, terms<Kind>(n), more);
    }
    write_rows(dk, size.qk, keys, nullptr, 1.0f, h.dk);
    write_rows(dv, size.vo, keys, nullptr, 1.0f, h.dv);
}

}  // namespace
