// Attention over packed sequences: one head of one sequence at a time, all of it in cache.
//
// One thread does all of a head's sums, in order: results have the same bits on any number of
// threads. Nothing larger than kRows rows of scores is held; backward draws dropout again.
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
    const int64_t qk = words<Kind>(h.q.width), vo = words<Kind>(h.v.width);
    float* const kt = scratch.cut(qk, length);
    float* const packed_v = scratch.cut(all, vo);
    float* const packed_k = scratch.cut(all, std::max(qk, size.vo));
    float* const queries = scratch.cut(rows, qk);
    float* const p = scratch.cut(rows, length);
    float* const narrowed = scratch.cut(rows, length / 2);
    float* const out = scratch.cut(rows, size.vo);
    float* const inverse = scratch.cut(1, kRows);
    Kind::load_rows(h.k, keys, all, packed_k, qk);
    transpose(packed_k, qk, keys, terms<Kind>(h.k.width), kt, length);
    Kind::load_rows(h.v, keys, all, packed_v, vo);
    // Over packed_k, which is transposed by now.
    const float* const values = Kind::right(packed_v, vo, all, h.v.width, packed_k, size.vo);
    for (int64_t first = 0; first < size.queries; first += kRows) {
        const int64_t n = std::min(kRows, size.queries - first);
        Kind::load_rows(h.q.at(first), n, n, queries, qk);
        prefetch<1>(h.out.at(first), n);
        Kind::multiply(Left{queries, qk, 1}, n, kt, length, p, length, keys, terms<Kind>(h.q.width),
                       false);
        softmax(p, length, n, keys, size.scale, drop, first, inverse, h.logsumexp + first);
        Kind::multiply(Kind::left(p, length, n, keys, narrowed), n, values, size.vo, out, size.vo,
                       h.v.width, terms<Kind>(keys), false);
        write_rows(out, size.vo, n, inverse, drop.rate, h.out.at(first));
    }
}

template <class Kind>
void backward_head(const Head& h, const Sizes& size, const Drop& drop, Scratch scratch) {
    const int64_t keys = size.keys, length = size.scores(), all = padded(keys), rows = size.rows();
    const int64_t qk = words<Kind>(h.q.width), vo = words<Kind>(h.v.width);
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
    float* const p = scratch.cut(rows, length);
    float* const g = scratch.cut(rows, length);
    float* const narrowed = scratch.cut(rows, length / 2);
    Kind::load_rows(h.v, keys, all, packed_v, vo);
    transpose(packed_v, vo, keys, terms<Kind>(h.v.width), vt, length);
    Kind::load_rows(h.k, keys, all, packed_k, qk);
    transpose(packed_k, qk, keys, terms<Kind>(h.k.width), kt, length);
    const float* const right_k =
        Kind::right(packed_k, qk, all, h.k.width, scratch.cut(all, size.qk), size.qk);
    prefetch<1>(h.dk, std::min(kRows, keys));
    prefetch<1>(h.dv, std::min(kRows, keys));
    if (size.queries == 0) {
        std::memset(dk, 0, static_cast<size_t>(keys) * size.qk * 4);
        std::memset(dv, 0, static_cast<size_t>(keys) * size.vo * 4);
    }
    for (int64_t first = 0; first < size.queries; first += kRows) {
        const int64_t n = std::min(kRows, size.queries - first), even = n + n % 2;
        const bool more = first > 0;
        Kind::load_rows(h.q.at(first), n, even, packed_q, qk);
        Kind::load_rows(h.out.at(first), n, even, packed_d, vo);
        const float* const q = Kind::right(packed_q, qk, even, h.q.width, right_q, size.qk);
        const float* const d = Kind::right(packed_d, vo, even, h.v.width, right_d, size.vo);
        Kind::multiply(Left{packed_q, qk, 1}, n, kt, length, p, length, keys,
                       terms<Kind>(h.q.width), false);
        prefetch<1>(h.dq.at(first), n);
        Kind::multiply(Left{packed_d, vo, 1}, n, vt, length, g, length, keys,
                       terms<Kind>(h.v.width), false);
        softmax_backward(p, g, length, n, keys, size.scale, drop, first);
        Kind::multiply(Kind::left(g, length, n, keys, narrowed), n, right_k, size.qk, dq, size.qk,
                       h.q.width, terms<Kind>(keys), false);
        write_rows(dq, size.qk, n, nullptr, 1.0f, h.dq.at(first));
        Kind::multiply(Kind::turned(g, length, n, keys), keys, q, size.qk, dk, size.qk, h.k.width,
                       terms<Kind>(n), more);
        Kind::multiply(Kind::turned(p, length, n, keys), keys, d, size.vo, dv, size.vo, h.v.width,
                       terms<Kind>(n), more);
    }
    write_rows(dk, size.qk, keys, nullptr, 1.0f, h.dk);
    write_rows(dv, size.vo, keys, nullptr, 1.0f, h.dv);
}

Rows rows_of(const Tensor& t, const char* name, ScalarType dtype) {
    check_cpu(t, name);
    check_dim(t, name, 3);
    check_dtype(t, name, dtype);
    // Of a tensor without elements no stride means anything.
    STD_TORCH_CHECK(t.size(2) < 2 || t.stride(2) == 1 || t.numel() == 0, name,
                    ": expected a unit last stride");
    return {static_cast<char*>(t.data_ptr()), t.stride(0), t.size(2),
            dtype == ScalarType::BFloat16};
}

void clear_rows(const Tensor& t, int64_t from) {
    const int64_t bytes = t.size(1) * t.size(2) * (t.scalar_type() == ScalarType::Float ? 4 : 2);
    if (const int64_t rest = (t.size(0) - from) * bytes)  // memory for none may be null
        std::memset(static_cast<char*>(t.data_ptr()) + from * bytes, 0, rest);
}

void check_rows(const Tensor& t, const char* name, int64_t tokens, int64_t heads, int64_t width) {
    check_size(t, name, 0, tokens);
    check_size(t, name, 1, heads);
    check_size(t, name, 2, width);
}

const int32_t* offsets_of(const Tensor& t, const char* name) {
    check_cpu(t, name);
    check_dtype(t, name, ScalarType::Int);
    check_contiguous(t, name);
    return static_cast<const int32_t*>(t.data_ptr());
}

float* logsumexp_of(const Tensor& t, const Tensor& q) {
    check_cpu(t, "logsumexp");
    check_dtype(t, "logsumexp", ScalarType::Float);
    check_contiguous(t, "logsumexp");
    check_numel(t, "logsumexp", q.size(1) * q.size(0));
    return static_cast<float*>(t.data_ptr());
}

Drop drop_of(const Tensor& seed, int64_t threshold) {
    check_cpu(seed, "seed");
    check_dtype(seed, "seed", ScalarType::Long);
    check_numel(seed, "seed", 1);
    check_count(threshold, "threshold", 0, 65536);
    return {static_cast<uint64_t>(*static_cast<const int64_t*>(seed.data_ptr())), 0, 0,
            static_cast<uint32_t>(threshold),
            threshold ? 65536.0f / static_cast<float>(threshold) : 0.0f};
}

// A call: sequences, heads, and one operand's part for a sequence and head.
struct Call {
    const int32_t *cu_q, *cu_k;
    int64_t sequences, heads;
    Sizes longest;
    Drop drop;

    Call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q_,
         const Tensor& cu_k_, const Tensor& seed, int64_t threshold, double scale)
        : cu_q(offsets_of(cu_q_, "cu_seqlens_query")),
          cu_k(offsets_of(cu_k_, "cu_seqlens")),
          sequences(cu_k_.numel() - 1),
          heads(q.size(1)),
          longest{0, 0, padded(q.size(2)), padded(v.size(2)), static_cast<float>(scale)},
          drop(drop_of(seed, threshold)) {
        STD_TORCH_CHECK(cu_q_.numel() == sequences + 1, "cu_seqlens_query: expected ",
                        sequences + 1, " entries, got ", cu_q_.numel());
        STD_TORCH_CHECK(sequences >= 0, "cu_seqlens: expected at least one offset");
        check_rows(k, "key", k.size(0), heads, q.size(2));
        check_rows(v, "value", k.size(0), heads, v.size(2));
        check_offsets(cu_q, "cu_seqlens_query", q.size(0));
        check_offsets(cu_k, "cu_seqlens", k.size(0));
        for (int64_t s = 0; s < sequences; ++s) {
            longest.queries = std::max<int64_t>(longest.queries, cu_q[s + 1] - cu_q[s]);
            longest.keys = std::max<int64_t>(longest.keys, cu_k[s + 1] - cu_k[s]);
        }
    }

    void check_offsets(const int32_t* at, const char* name, int64_t tokens) const {
        check_pointers(at, sequences, name, at[sequences]);
        STD_TORCH_CHECK(at[sequences] <= tokens, name, ": expected offsets up to ", tokens,
                        ", got ", at[sequences]);
    }

    // Calls run(head, sizes, drop) for each, and ahead(head, sizes) before the one before it;
    // make(sequence, head): a head's operands. Heads of few sequences go in small groups.
    template <class Make, class Ahead, class Run>
    void for_each_head(const Make& make, const Ahead& ahead, const Run& run) const {
        const int64_t group = sequences < 16 ? 4 : heads;
        const int64_t groups = ceil_div(heads, group);
        for_each(sequences * groups, [&](int64_t task) {
            const int64_t s = task / groups, begin = task % groups * group;
            const int64_t end = std::min(heads, begin + group);
            Sizes size = longest;
            size.queries = cu_q[s + 1] - cu_q[s], size.keys = cu_k[s + 1] - cu_k[s];
            Drop mine = drop;
            mine.first_row = cu_q[s];
            Head head = make(s, begin);
            for (mine.head = begin; mine.head < end; ++mine.head) {
                const Head next = make(s, std::min(mine.head + 1, end - 1));
                if (mine.head + 1 < end) ahead(next, size);
                run(head, size, mine);
                head = next;
            }
        });
    }
};

void varlen_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q,
                      const Tensor& cu_k, const Tensor& seed, int64_t threshold, double scale,
                      bool pairs, Tensor& out, Tensor& logsumexp) {
    const ScalarType dtype = q.scalar_type();
    const Rows qs = rows_of(q, "query", dtype), ks = rows_of(k, "key", dtype),
               vs = rows_of(v, "value", dtype), outs = rows_of(out, "out", dtype);
    check_contiguous(out, "out");
    const Call call(q, k, v, cu_q, cu_k, seed, threshold, scale);
    check_rows(out, "out", q.size(0), call.heads, v.size(2));
    float* const lse = logsumexp_of(logsumexp, q);
    const int64_t used = call.cu_q[call.sequences], tokens = q.size(0);
    clear_rows(out, used);
    for (int64_t head = 0; head < call.heads; ++head)
        std::fill(lse + head * tokens + used, lse + (head + 1) * tokens, 0.0f);
    const bool in_pairs = pairs && qs.bf16 && Pairs::available();
    const int64_t floats = call.longest.floats(), qh = q.stride(1), kh = k.stride(1),
                  vh = v.stride(1), oh = out.stride(1);
    call.for_each_head(
        [&](int64_t s, int64_t head) {
            Head h = {};
            h.q = qs.at(call.cu_q[s], head * qh);
            h.k = ks.at(call.cu_k[s], head * kh);
            h.v = vs.at(call.cu_k[s], head * vh);
            h.out = outs.at(call.cu_q[s], head * oh);
            h.logsumexp = lse + head * tokens + call.cu_q[s];
            return h;
        },
        [](const Head& h, const Sizes& size) {
            prefetch<0>(h.q, std::min(kRows, size.queries));
            prefetch<0>(h.k, size.keys);
            prefetch<0>(h.v, size.keys);
        },
        [&](const Head& h, const Sizes& size, const Drop& drop) {
            (in_pairs ? forward_head<Pairs> : forward_head<Floats>)(h, size, drop, Scratch(floats));
        });
}

void varlen_attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                               const Tensor& v, const Tensor& cu_q, const Tensor& cu_k,
                               const Tensor& seed, int64_t threshold, double scale, bool pairs,
                               Tensor& dq, Tensor& dk, Tensor& dv) {
    const ScalarType dtype = q.scalar_type();
    const Rows qs = rows_of(q, "query", dtype), ks = rows_of(k, "key", dtype),
               vs = rows_of(v, "value", dtype), douts = rows_of(dout, "dout", dtype),
               dqs = rows_of(dq, "dq", dtype), dks = rows_of(dk, "dk", dtype),
               dvs = rows_of(dv, "dv", dtype);
    check_contiguous(dq, "dq");
    check_contiguous(dk, "dk");
    check_contiguous(dv, "dv");
    const Call call(q, k, v, cu_q, cu_k, seed, threshold, scale);
    check_rows(dout, "dout", q.size(0), call.heads, v.size(2));
    check_rows(dq, "dq", q.size(0), call.heads, q.size(2));
    check_rows(dk, "dk", k.size(0), call.heads, q.size(2));
    check_rows(dv, "dv", k.size(0), call.heads, v.size(2));
    clear_rows(dq, call.cu_q[call.sequences]);
    clear_rows(dk, call.cu_k[call.sequences]);
    clear_rows(dv, call.cu_k[call.sequences]);
    const bool in_pairs = pairs && qs.bf16 && Pairs::available();
    const int64_t floats = call.longest.floats(), qh = q.stride(1), kh = k.stride(1),
                  vh = v.stride(1), oh = dout.stride(1), dqh = dq.stride(1), dkh = dk.stride(1),
                  dvh = dv.stride(1);
    call.for_each_head(
        [&](int64_t s, int64_t head) {
            Head h = {};
            h.q = qs.at(call.cu_q[s], head * qh);
            h.k = ks.at(call.cu_k[s], head * kh);
            h.v = vs.at(call.cu_k[s], head * vh);
            h.out = douts.at(call.cu_q[s], head * oh);
            h.dq = dqs.at(call.cu_q[s], head * dqh);
            h.dk = dks.at(call.cu_k[s], head * dkh);
            h.dv = dvs.at(call.cu_k[s], head * dvh);
            return h;
        },
        [](const Head& h, const Sizes& size) {
            prefetch<0>(h.q, std::min(kRows, size.queries));
            prefetch<0>(h.out, std::min(kRows, size.queries));
            prefetch<0>(h.k, size.keys);
            prefetch<0>(h.v, size.keys);
        },
        [&](const Head& h, const Sizes& size, const Drop& drop) {
            (in_pairs ? backward_head<Pairs> : backward_head<Floats>)(h, size, drop,
                                                                      Scratch(floats));
        });
}

// probabilities `[sequences, heads, queries, keys]`, padded: dropped ones to 0, others scaled.
void varlen_attention_drop(Tensor& p, const Tensor& starts, const Tensor& seed, int64_t threshold) {
    check_cpu(p, "p");
    check_dim(p, "p", 4);
    check_contiguous(p, "p");
    const int32_t* const start = offsets_of(starts, "starts");
    const bool bf16 = p.scalar_type() == ScalarType::BFloat16;
    if (!bf16) check_dtype(p, "p", ScalarType::Float);
    check_numel(starts, "starts", p.size(0));
    const int64_t heads = p.size(1), rows = p.size(2), keys = p.size(3);
    const Drop drop = drop_of(seed, threshold);
    char* const base = static_cast<char*>(p.data_ptr());
    for_each(p.size(0) * heads, [&](int64_t task) {
        Drop mine = drop;
        mine.head = task % heads, mine.first_row = start[task / heads];
        char* const at = base + task * rows * keys * (bf16 ? 2 : 4);
        if (bf16)
            drop_bfloat16(reinterpret_cast<uint16_t*>(at), rows, keys, mine);
        else
            drop_float(reinterpret_cast<float*>(at), rows, keys, mine);
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sensikernels_native, m) {
    m.def(
        "varlen_attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_query, "
        "Tensor cu_seqlens, Tensor seed, int threshold, float scale, bool pairs, Tensor(a!) out, "
        "Tensor(b!) logsumexp) -> ()");
    m.def(
        "varlen_attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value, "
        "Tensor cu_seqlens_query, Tensor cu_seqlens, Tensor seed, int threshold, float scale, "
        "bool pairs, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
    m.def("varlen_attention_drop(Tensor(a!) p, Tensor starts, Tensor seed, int threshold) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CPU, m) {
    m.impl("varlen_attention", TORCH_BOX(&varlen_attention));
    m.impl("varlen_attention_backward", TORCH_BOX(&varlen_attention_backward));
    m.impl("varlen_attention_drop", TORCH_BOX(&varlen_attention_drop));
}
