// CUDA's own names on the CPU; included by cpu_shim.h, which says how to use both.
#pragma once

#define __shared__ static  // not poisoned: prefer SK_SHARED

inline void __syncthreads() {
    sk_shim::block_barrier(false);
}
inline int __syncthreads_count(int p) {
    return sk_shim::block_barrier(p != 0);
}
inline int __syncthreads_or(int p) {
    return __syncthreads_count(p) != 0;
}
inline int __syncthreads_and(int p) {
    return !__syncthreads_or(!p);
}
inline void __syncwarp(unsigned mask = ~0u) {
    sk_shim::collective(sk_shim::Wait::syncwarp, mask, 0);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const int base = sk_shim::machine.current % 32 / width * width;
    return sk_shim::shuffle(mask, value, base + (source & (width - 1)), true);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
    const int lane = sk_shim::machine.current % 32, source = lane ^ lanes;
    return sk_shim::shuffle(mask, value, source, source < (lane / width + 1) * width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const int lane = sk_shim::machine.current % 32, source = lane - static_cast<int>(delta);
    return sk_shim::shuffle(mask, value, source, source >= lane / width * width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const int lane = sk_shim::machine.current % 32, source = lane + static_cast<int>(delta);
    return sk_shim::shuffle(mask, value, source, source < (lane / width + 1) * width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const auto& fiber = sk_shim::collective(sk_shim::Wait::ballot, mask, predicate != 0);
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane)
        if (fiber.present >> lane & 1) votes |= static_cast<unsigned>(fiber.inbox[lane]) << lane;
    return votes;
}
inline int __any_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
    return !__any_sync(mask, !predicate);
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
    const uint64_t own = sk_shim::pack(value);
    const auto& fiber = sk_shim::collective(sk_shim::Wait::shuffle, mask, own);
    unsigned equal = 0;
    for (int lane = 0; lane < 32; ++lane)
        if (fiber.present >> lane & 1 && fiber.inbox[lane] == own) equal |= 1u << lane;
    return equal;
}
template <class T, class F>
T sk_shim_reduce(unsigned mask, T value, F&& f) {
    const auto& fiber = sk_shim::collective(sk_shim::Wait::shuffle, mask, sk_shim::pack(value));
    const int self = sk_shim::machine.current % 32;
    for (int lane = 0; lane < 32; ++lane)
        if (lane != self && fiber.present >> lane & 1)
            value = f(value, sk_shim::bits<T>(fiber.inbox[lane]));
    return value;
}
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
    return sk_shim_reduce(mask, value, [](T a, T b) { return a + b; });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
    return sk_shim_reduce(mask, value, [](T a, T b) { return std::max(a, b); });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
    return sk_shim_reduce(mask, value, [](T a, T b) { return std::min(a, b); });
}

#define SK_ATOMIC(name, expression)                                                               \
    template <class T>                                                                            \
    T name(T* address, sk_shim::same_t<T> value) {                                                \
        return sk_shim::update(address, [&]([[maybe_unused]] T old) -> T { return expression; }); \
    }
SK_ATOMIC(atomicAdd, old + value)
SK_ATOMIC(atomicSub, old - value)
SK_ATOMIC(atomicMax, std::max(old, value))
SK_ATOMIC(atomicMin, std::min(old, value))
SK_ATOMIC(atomicAnd, old& value)
SK_ATOMIC(atomicOr, old | value)
SK_ATOMIC(atomicXor, old ^ value)
SK_ATOMIC(atomicExch, value)
SK_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
#undef SK_ATOMIC
template <class T>
T atomicCAS(T* address, sk_shim::same_t<T> compare, sk_shim::same_t<T> value) {
    return sk_shim::update(address, [&](T old) { return old == compare ? value : old; });
}

template <class T>
T __ldg(const T* p) {
    return *p;
}
template <class T>
T __ldcs(const T* p) {
    return *p;
}
template <class T>
T __ldcg(const T* p) {
    return *p;
}
template <class T>
void __stcs(T* p, sk_shim::same_t<T> v) {
    *p = v;
}
template <class T>
void __stcg(T* p, sk_shim::same_t<T> v) {
    *p = v;
}

inline unsigned __float_as_uint(float v) {
    return sk_shim::bits<unsigned>(v);
}
inline float __uint_as_float(unsigned v) {
    return sk_shim::bits<float>(v);
}
inline int __float_as_int(float v) {
    return sk_shim::bits<int>(v);
}
inline float __int_as_float(int v) {
    return sk_shim::bits<float>(v);
}
inline long long __double_as_longlong(double v) {
    return sk_shim::bits<long long>(v);
}
inline double __longlong_as_double(long long v) {
    return sk_shim::bits<double>(v);
}
inline int __popc(unsigned v) {
    return __builtin_popcount(v);
}
inline int __popcll(unsigned long long v) {
    return __builtin_popcountll(v);
}
inline int __ffs(int v) {
    return __builtin_ffs(v);
}
inline int __ffsll(long long v) {
    return __builtin_ffsll(v);
}
inline int __clz(int v) {
    return v ? __builtin_clz(static_cast<unsigned>(v)) : 32;
}
inline int __clzll(long long v) {
    return v ? __builtin_clzll(static_cast<unsigned long long>(v)) : 64;
}
inline float __fadd_rn(float a, float b) {
    return a + b;
}
inline float __fsub_rn(float a, float b) {
    return a - b;
}
inline float __fmul_rn(float a, float b) {
    return a * b;
}
inline float __fdiv_rn(float a, float b) {
    return a / b;
}
inline float __fmaf_rn(float a, float b, float c) {
    return std::fma(a, b, c);
}
inline float __fsqrt_rn(float v) {
    return std::sqrt(v);
}
inline float __fdividef(float a, float b) {
    return a / b;
}
inline float __expf(float v) {
    return std::exp(v);
}
inline float rsqrtf(float v) {
    return 1.0f / std::sqrt(v);
}
template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
    return b < a ? b : a;
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
    return a < b ? b : a;
}

// The 16-bit types: values in float, rounded to nearest even at every store.
struct alignas(2) __nv_bfloat16 {
    uint16_t raw = 0;
    __nv_bfloat16() = default;
    __nv_bfloat16(float v) {
        const uint32_t u = sk_shim::bits<uint32_t>(v);
        raw = v != v ? 0x7FFF : static_cast<uint16_t>((u + 0x7FFF + (u >> 16 & 1)) >> 16);
    }
    operator float() const { return sk_shim::bits<float>(uint32_t{raw} << 16); }
};
struct alignas(2) __half {
    _Float16 value = 0;
    __half() = default;
    __half(float v) : value(static_cast<_Float16>(v)) {}
    operator float() const { return static_cast<float>(value); }
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
    __half x, y;
};
using nv_bfloat16 = __nv_bfloat16;
using half = __half;

inline float __bfloat162float(__nv_bfloat16 v) {
    return v;
}
inline __nv_bfloat16 __float2bfloat16(float v) {
    return v;
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
    return v;
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) {
    return v.raw;
}
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short v) {
    return sk_shim::bits<__nv_bfloat16>(v);
}
inline float2 __bfloat1622float2(__nv_bfloat162 v) {
    return {v.x, v.y};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {x, y};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) {
    return {v.x, v.y};
}
inline float __half2float(__half v) {
    return v;
}
inline __half __float2half(float v) {
    return v;
}
inline __half __float2half_rn(float v) {
    return v;
}
inline unsigned short __half_as_ushort(__half v) {
    return sk_shim::bits<unsigned short>(v);
}
inline __half __ushort_as_half(unsigned short v) {
    return sk_shim::bits<__half>(v);
}
inline float2 __half22float2(__half2 v) {
    return {v.x, v.y};
}
inline __half2 __floats2half2_rn(float x, float y) {
    return {x, y};
}
inline __half2 __float22half2_rn(float2 v) {
    return {v.x, v.y};
}
