// Softmax cross-entropy of rows of logits: the forward reads them once, and so does the backward.
//
// A row of BERT's vocabulary stays in the second cache between its largest logit and its sum. Kept
// for backward are two floats a row: the largest logit and the logarithm of the sum of e^(x - it),
// apart, since their own sum would round off what large logits have in common.
#include "checks.h"
#include "cpu/exponential.h"
#include "cpu/parallel.h"
#include "cpu/philox.h"

#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#define SK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define SK_LAMBDA __attribute__((always_inline))

namespace {

using namespace sk;

constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

typedef uint16_t Halves __attribute__((vector_size(kLanes * 2), aligned(2)));

SK_INLINE Vec wide(const float* p) {
    return load(p);
}
SK_INLINE Vec wide(const uint16_t* p) {
    return (Vec)(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Bits) << 16);
}

// Calls use(first column, lanes, values) along a row; lanes beyond the row hold -infinity.
template <class T, class F>
SK_INLINE void along(const T* x, int64_t n, const F& use) {
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) use(j, kLanes, wide(x + j));
    if (j == n) return;
    Vec rest = Vec{} + kLowest;
    for (int64_t i = j; i < n; ++i) rest[i - j] = widen(x[i]);
    use(j, static_cast<int>(n - j), rest);
}

SK_INLINE float largest_of(Vec v) {
    float top = v[0];
    for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
    return top;
}

// The largest logit and the logarithm of the sum, into `stats`; returns the row's loss.
template <class T>
SK_INLINE float forward_row(const T* x, int64_t n, int64_t label, float* stats) {
    Vec tops = Vec{} + kLowest, sums = {};
    along(x, n, [&](int64_t, int, const Vec& v) SK_LAMBDA { tops = v > tops ? v : tops; });
    const float top = largest_of(tops);
    along(x, n, [&](int64_t, int, const Vec& v) SK_LAMBDA { sums += exponential(v - top); });
    stats[0] = top;
    stats[1] = std::log(fold(sums));
    return (top - widen(x[label])) + stats[1];
}

template <class T>
SK_INLINE void backward_row(const T* x, int64_t n, int64_t label, const float* stats, float scale,
                            T* dx) {
    const float top = stats[0], rest = stats[1];
    along(x, n, [&](int64_t j, int lanes, const Vec& v) SK_LAMBDA {
        const Vec d = exponential((v - top) - rest) * scale;
        if (lanes == kLanes)
            for (int i = 0; i < kLanes; ++i) narrow(d[i], dx + j + i);
        else
            for (int i = 0; i < lanes; ++i) narrow(d[i], dx + j + i);
    });
    narrow((std::exp((widen(x[label]) - top) - rest) - 1.0f) * scale, dx + label);
}

SK_CLONES float forward(const float* x, int64_t n, int64_t label, float* stats) {
    return forward_row(x, n, label, stats);
}
SK_CLONES float forward(const uint16_t* x, int64_t n, int64_t label, float* stats) {
    return forward_row(x, n, label, stats);
}
SK_CLONES void backward(const float* x, int64_t n, int64_t label, const float* stats, float scale,
                        float* dx) {
    backward_row(x, n, label, stats, scale, dx);
}
SK_CLONES void backward(const uint16_t* x, int64_t n, int64_t label, const float* stats,
                        float scale, uint16_t* dx) {
    backward_row(x, n, label, stats, scale, dx);
}

template <class T>
T* data(const Tensor& t, const char* name, ScalarType dtype, int64_t numel) {
    check_cpu(t, name);
    check_contiguous(t, name);
    check_dtype(t, name, dtype);
    check_numel(t, name, numel);
    return static_cast<T*>(t.data_ptr());
}

// Rows of logits with their labels, float32 or bfloat16.
struct Rows {
    int64_t count, classes, ignored;
    const int64_t* labels;
    const void* logits;
    bool single;

    Rows(const Tensor& x, const Tensor& labels_, int64_t ignored_) : ignored(ignored_) {
        check_dim(x, "logits", 2);
        count = x.size(0), classes = x.size(1);
        single = x.scalar_type() == ScalarType::Float;
        const ScalarType dtype = single ? ScalarType::Float : ScalarType::BFloat16;
        logits = data<void>(x, "logits", dtype, count * classes);
        labels = data<int64_t>(labels_, "labels", ScalarType::Long, count);
    }

    // The first row whose label is neither a class nor `ignored`; -1 if there is none.
    int64_t first_wrong() const {
        for (int64_t i = 0; i < count; ++i)
            if (labels[i] != ignored && (labels[i] < 0 || labels[i] >= classes)) return i;
        return -1;
    }

    // Calls run(row, its logits), several rows a task where they are short.
    template <class F>
    void each(const F& run) const {
        const int64_t block = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, classes));
        for_each(ceil_div(count, block), [&](int64_t task) {
            for (int64_t i = task * block; i < std::min(count, (task + 1) * block); ++i)
                if (single)
                    run(i, static_cast<const float*>(logits) + i * classes);
                else
                    run(i, static_cast<const uint16_t*>(logits) + i * classes);
        });
    }
};

// Mean loss of the rows whose label is not `ignored`, and 1 / their number. Returns the first row
// with a label that is no class, -1 if there is none.
int64_t cross_entropy(const Tensor& logits, const Tensor& labels, int64_t ignored, Tensor& stats,
                      Tensor& loss, Tensor& scale) {
    const Rows rows(logits, labels, ignored);
    float* kept = data<float>(stats, "stats", ScalarType::Float, 2 * rows.count);
    float* mean = data<float>(loss, "loss", ScalarType::Float, 1);
    float* share = data<float>(scale, "scale", ScalarType::Float, 1);
    const int64_t wrong = rows.first_wrong();
    if (wrong >= 0) return wrong;
    int64_t counted = 0;
    for (int64_t i = 0; i < rows.count; ++i) counted += rows.labels[i] != ignored;
    std::vector<float> losses(rows.count);
    rows.each([&](int64_t i, const auto* x) {
        kept[2 * i] = kept[2 * i + 1] = 0.0f;
        if (rows.labels[i] != ignored)
            losses[i] = forward(x, rows.classes, rows.labels[i], kept + 2 * i);
    });
    double total = 0.0;
    for (const float one : losses) total += one;
    *mean = counted ? static_cast<float>(total / static_cast<double>(counted)) : kNan;
    *share = 1.0f / static_cast<float>(counted);
    return -1;
}

// (softmax - one at the label) · dloss · scale; rows that are ignored get 0.
void cross_entropy_backward(const Tensor& dloss, const Tensor& logits, const Tensor& labels,
                            const Tensor& stats, const Tensor& scale, int64_t ignored,
                            Tensor& dlogits) {
    const Rows rows(logits, labels, ignored);
    const int64_t wrong = rows.first_wrong();
    STD_TORCH_CHECK(wrong < 0, "labels: expected a class below ", rows.classes, " or ", ignored,
                    ", got ", rows.labels[wrong < 0 ? 0 : wrong], " in row ", wrong);
    const float* kept = data<float>(stats, "stats", ScalarType::Float, 2 * rows.count);
    const float share = *data<float>(dloss, "dloss", ScalarType::Float, 1) *
                        *data<float>(scale, "scale", ScalarType::Float, 1);
    void* to = data<void>(dlogits, "dlogits", logits.scalar_type(), rows.count * rows.classes);
    rows.each([&](int64_t i, const auto* x) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
        T* dx = static_cast<T*>(to) + i * rows.classes;
        if (rows.labels[i] == ignored)
            std::fill_n(dx, rows.classes, T{});
        else
            backward(x, rows.classes, rows.labels[i], kept + 2 * i, share, dx);
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sensikernels_native, m) {
    m.def(
        "cross_entropy(Tensor logits, Tensor labels, int ignored, Tensor(a!) stats, "
        "Tensor(b!) loss, Tensor(c!) scale) -> int");
    m.def(
        "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor labels, Tensor stats, "
        "Tensor scale, int ignored, Tensor(a!) dlogits) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CPU, m) {
    m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
    m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
}
