// Rows of a LayerNorm, forward and backward, and the draws of a dropout beside them.
//
// A few rows at a time are read from memory once; every later pass finds them in the first cache.
#pragma once

#include "checks.h"
#include "cpu/column_sums.h"
#include "cpu/lanes.h"
#include "cpu/philox.h"

#include <cmath>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#define SK_LAMBDA __attribute__((always_inline))

namespace sk {

constexpr int kTile = 8 * kPhiloxLanes;

// Dropout of a flat tensor: element i is kept where its draw is below `threshold` of 65,536.
struct Dropout {
    uint64_t seed;
    uint32_t threshold;
    float scale;

    Dropout(const std::optional<Tensor>& seed_, int64_t threshold_)
        : seed(0), threshold(static_cast<uint32_t>(threshold_)), scale(0.0f) {
        if (seed_) {
            check_cpu(*seed_, "seed");
            check_dtype(*seed_, "seed", ScalarType::Long);
            check_numel(*seed_, "seed", 1);
            seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed_->data_ptr()));
        }
        check_count(threshold_, "threshold", 0, 65536);
        STD_TORCH_CHECK(seed_ || threshold_ == 65536, "seed: expected one beside a dropout");
        if (threshold) scale = 65536.0f / static_cast<float>(threshold);
    }
    bool drops() const { return threshold < 65536; }
};

// A function of its own: where it is inlined, gcc may lose the vectors of the rounds.
SK_CLONES static void draw_tiles(uint64_t seed, int64_t begin, int64_t end,
                                 uint16_t* __restrict to) {
    uint32_t words[4][kPhiloxLanes];
    for (int64_t tile = begin; tile < end; ++tile, to += kTile) {
        philox(seed, static_cast<uint64_t>(tile) * kPhiloxLanes, words);
        for (int w = 0; w < 4; ++w)
            for (int i = 0; i < kPhiloxLanes; ++i) {
                to[w * kPhiloxLanes + i] = static_cast<uint16_t>(words[w][i]);
                to[64 + w * kPhiloxLanes + i] = static_cast<uint16_t>(words[w][i] >> 16);
            }
    }
}

// The draws of elements [first, first + n), in whole tiles into `buffer` (n + 2 tiles): word w,
// half h of lane l is element 64 h + 16 w + l of its tile.
inline const uint16_t* draw(const Dropout& dropout, int64_t first, int64_t n, uint16_t* buffer) {
    draw_tiles(dropout.seed, first / kTile, ceil_div(first + n, kTile), buffer);
    return buffer + first % kTile;
}

// A row by vectors, and by single elements at its end: the second argument says which.
template <class F>
SK_INLINE void by_lanes(int64_t n, const F& run) {
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) run(j, Vec{});
    for (; j < n; ++j) run(j, 0.0f);
}

typedef uint16_t Halves __attribute__((vector_size(kLanes * 2), aligned(2)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));

template <class V, class T>
SK_INLINE V read(const T* p) {
    if constexpr (std::is_same_v<V, float>)
        return widen(*p);
    else if constexpr (std::is_same_v<T, float>)
        return load(p);
    else
        return (Vec)(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words) << 16);
}

SK_INLINE void write(const Vec& v, float* p) {
    store(p, v);
}
SK_INLINE void write(const Vec& v, uint16_t* p) {
    const Words bits = (Words)v;
    const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Words kept = (bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded;
    *reinterpret_cast<Halves*>(p) = __builtin_convertvector(kept, Halves);
}
template <class T>
SK_INLINE void write(float v, T* p) {
    narrow(v, p);
}

// v scaled where its draw is below the threshold, else 0.
SK_INLINE Vec kept(const Vec& v, const uint16_t* draws, const Dropout& dropout) {
    const Words drawn = __builtin_convertvector(*reinterpret_cast<const Halves*>(draws), Words);
    return drawn < dropout.threshold ? v * dropout.scale : Vec{};
}
SK_INLINE float kept(float v, const uint16_t* draws, const Dropout& dropout) {
    return *draws < dropout.threshold ? v * dropout.scale : 0.0f;
}

struct Sum {
    Vec lanes = {};
    float rest = 0.0f;

    SK_INLINE void add(const Vec& v) { lanes += v; }
    SK_INLINE void add(float v) { rest += v; }
    SK_INLINE float total() const { return fold(lanes) + rest; }
};

struct Moments {
    float mean, rstd;
};

// Rows that are worked on together: their sums are chains that do not wait for each other.
constexpr int kRows = 4;
#define SK_ROWS _Pragma("GCC unroll 4") for (int r = 0; r < R; ++r)

// The moments of a row whose deviations are small beside its mean, where the rounding of that mean
// counts: of equal elements nothing may be left. Also of one too large to square.
[[gnu::noinline]] static Moments moments_in_double(const float* z, int64_t n, float eps) {
    double sum = 0, squares = 0;
    for (int64_t j = 0; j < n; ++j) sum += z[j];
    const double mean = sum / static_cast<double>(n);
    for (int64_t j = 0; j < n; ++j) squares += (z[j] - mean) * (z[j] - mean);
    const double rstd = 1.0 / std::sqrt(squares / static_cast<double>(n) + eps);
    return {static_cast<float>(mean), static_cast<float>(rstd)};
}

// The moments of R rows of z, one after the other, whose sums are known. In two passes: a mean that
// is large beside the deviations cancels nothing.
template <int R>
SK_INLINE void moments(const float* __restrict z, const Sum* sums, int64_t n, float eps,
                       Moments* out) {
    constexpr float kClose = 0x1p-12f;  // squared: a deviation of 1/64 of the mean
    const float count = static_cast<float>(n);
    float mean[R];
    Sum squares[R];
    SK_ROWS mean[r] = sums[r].total() / count;
    by_lanes(n, [&](int64_t j, auto lane) SK_LAMBDA {
        SK_ROWS {
            const auto off = read<decltype(lane)>(z + r * n + j) - mean[r];
            squares[r].add(off * off);
        }
    });
    SK_ROWS {
        const float variance = squares[r].total() / count;
        if (__builtin_expect(variance >= mean[r] * mean[r] * kClose, 1))
            out[r] = {mean[r], 1.0f / std::sqrt(variance + eps)};
        else  // NaN too
            out[r] = moments_in_double(z + r * n, n, eps);
    }
}

SK_INLINE Moments moments(const float* z, int64_t n, float eps) {
    Sum sum;
    Moments out;
    by_lanes(n, [&](int64_t j, auto lane) SK_LAMBDA { sum.add(read<decltype(lane)>(z + j)); });
    moments<1>(z, &sum, n, eps, &out);
    return out;
}

// The gradients of R rows, one after the other. `grad(r, j, lane)` gives dy, `normal(j, lane)(r)`
// the normalised element, `put(r, j, dz)` takes the gradient; adds to dweight and dbias, which may
// be null.
template <int R, class Grad, class Normal, class Put>
SK_INLINE void norm_backward_rows(const Grad& grad, const Normal& normal, const Put& put,
                                  const Moments* saved, const float* __restrict weight,
                                  float* __restrict dweight, float* __restrict dbias, int64_t n) {
    Sum sums[R], products[R];
    by_lanes(n, [&](int64_t j, auto lane) SK_LAMBDA {
        using V = decltype(lane);
        const V w = read<V>(weight + j);
        const auto normal_of = normal(j, lane);
        V by_weight = {}, by_bias = {};
        SK_ROWS {
            const V dy = grad(r, j, lane), x = normal_of(r), g = dy * w;
            by_weight += dy * x;
            by_bias += dy;
            sums[r].add(g);
            products[r].add(g * x);
        }
        if (dweight) {
            write(read<V>(dweight + j) + by_weight, dweight + j);
            write(read<V>(dbias + j) + by_bias, dbias + j);
        }
    });
    const float count = static_cast<float>(n);
    float mean[R], along[R], rstd[R];
    SK_ROWS {
        rstd[r] = saved[r].rstd;
        mean[r] = sums[r].total() / count;
        along[r] = products[r].total() / count;
    }
    by_lanes(n, [&](int64_t j, auto lane) SK_LAMBDA {
        using V = decltype(lane);
        const V w = read<V>(weight + j);
        const auto normal_of = normal(j, lane);
        SK_ROWS {
            const V g = grad(r, j, lane) * w - mean[r];
            put(r, j, rstd[r] * (g - normal_of(r) * along[r]));
        }
    });
}

// From dy and z (both float32, scratch) of a row: dz in place of z. Adds to dweight and dbias.
SK_INLINE void norm_backward_row(const float* dy, float* z, Moments m, const float* weight,
                                 float* dweight, float* dbias, int64_t n) {
    norm_backward_rows<1>(
        [&](int, int64_t j, auto lane) SK_LAMBDA { return read<decltype(lane)>(dy + j); },
        [&](int64_t j, auto lane) SK_LAMBDA {
            return [=](int) SK_LAMBDA { return (read<decltype(lane)>(z + j) - m.mean) * m.rstd; };
        },
        [&](int, int64_t j, const auto& dz) SK_LAMBDA { write(dz, z + j); }, &m, weight, dweight,
        dbias, n);
}

// Memory for `n` elements, as it comes.
template <class T>
class Buffer {
  public:
    explicit Buffer(int64_t n) : data_(new T[n]) {}
    T* data() const { return data_.get(); }

  private:
    std::unique_ptr<T[]> data_;
};

// What a task works in: rows of float32 and of draws.
struct Scratch {
    Buffer<float> first, second;
    Buffer<uint16_t> draws;

    explicit Scratch(int64_t n) : first(n), second(n), draws(n + 2 * kTile) {}
};

// Calls run with a null pointer of the element type of t, float32 or bfloat16.
template <class F>
void by_type(const Tensor& t, const char* name, const F& run) {
    if (t.scalar_type() == ScalarType::Float) return run(static_cast<float*>(nullptr));
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::BFloat16, name,
                    ": expected float32 or bfloat16, got ", toString(t.scalar_type()));
    run(static_cast<uint16_t*>(nullptr));
}

// Data of a contiguous CPU tensor of `numel` elements.
template <class T>
T* data(const Tensor& t, const char* name, int64_t numel) {
    check_cpu(t, name);
    check_contiguous(t, name);
    constexpr ScalarType dtype = std::is_same_v<std::remove_const_t<T>, float> ? ScalarType::Float
                                 : std::is_same_v<std::remove_const_t<T>, int64_t>
                                     ? ScalarType::Long
                                     : ScalarType::BFloat16;
    check_dtype(t, name, dtype);
    check_numel(t, name, numel);
    return static_cast<T*>(t.data_ptr());
}

template <class T>
T* data(const std::optional<Tensor>& t, const char* name, int64_t numel) {
    return t ? data<T>(*t, name, numel) : nullptr;
}

}  // namespace sk
