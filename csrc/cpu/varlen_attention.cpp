// Attention over packed sequences: one head of one sequence at a time, all of it in cache.
//
// One thread does all of a head's sums, in order: results have the same bits on any number of
// threads. Nothing larger than kRows rows of scores is held; backward draws dropout again.
#include "cpu/varlen_attention_heads.h"

#include <optional>

namespace {

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
         const Tensor& cu_k_, const Tensor& seed, int64_t threshold, double scale,
         std::optional<int64_t> window)
        : cu_q(offsets_of(cu_q_, "cu_seqlens_query")),
          cu_k(offsets_of(cu_k_, "cu_seqlens")),
          sequences(cu_k_.numel() - 1),
          heads(q.size(1)),
          longest{0,
                  0,
                  padded(q.size(2)),
                  padded(v.size(2)),
                  static_cast<float>(scale),
                  window.value_or(std::numeric_limits<int64_t>::max())},
          drop(drop_of(seed, threshold)) {
        STD_TORCH_CHECK(cu_q_.numel() == sequences + 1, "cu_seqlens_query: expected ",
                        sequences + 1, " entries, got ", cu_q_.numel());
        STD_TORCH_CHECK(sequences >= 0, "cu_seqlens: expected at least one offset");
        if (window) check_count(*window, "window", 0, std::numeric_limits<int64_t>::max());
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
                      std::optional<int64_t> window, bool pairs, Tensor& out, Tensor& logsumexp) {
    const ScalarType dtype = q.scalar_type();
    const Rows qs = rows_of(q, "query", dtype), ks = rows_of(k, "key", dtype),
               vs = rows_of(v, "value", dtype), outs = rows_of(out, "out", dtype);
    check_contiguous(out, "out");
    const Call call(q, k, v, cu_q, cu_k, seed, threshold, scale, window);
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
                               const Tensor& seed, int64_t threshold, double scale,
                               std::optional<int64_t> window, bool pairs, Tensor& dq, Tensor& dk,
                               Tensor& dv) {
    const ScalarType dtype = q.scalar_type();
    const Rows qs = rows_of(q, "query", dtype), ks = rows_of(k, "key", dtype),
               vs = rows_of(v, "value", dtype), douts = rows_of(dout, "dout", dtype),
               dqs = rows_of(dq, "dq", dtype), dks = rows_of(dk, "dk", dtype),
               dvs = rows_of(dv, "dv", dtype);
    check_contiguous(dq, "dq");
    check_contiguous(dk, "dk");
    check_contiguous(dv, "dv");
    const Call call(q, k, v, cu_q, cu_k, seed, threshold, scale, window);
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
        "Tensor cu_seqlens, Tensor seed, int threshold, float scale, int? window, bool pairs, "
        "Tensor(a!) out, Tensor(b!) logsumexp) -> ()");
    m.def(
        "varlen_attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value, "
        "Tensor cu_seqlens_query, Tensor cu_seqlens, Tensor seed, int threshold, float scale, "
        "int? window, bool pairs, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
    m.def("varlen_attention_drop(Tensor(a!) p, Tensor starts, Tensor seed, int threshold) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CPU, m) {
    m.impl("varlen_attention", TORCH_BOX(&varlen_attention));
    m.impl("varlen_attention_backward", TORCH_BOX(&varlen_attention_backward));
    m.impl("varlen_attention_drop", TORCH_BOX(&varlen_attention_drop));
}
