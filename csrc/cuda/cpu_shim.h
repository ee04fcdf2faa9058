// One kernel source for two machines: nvcc compiles it for the GPU, a C++ compiler runs it here.
//
//   csrc/cuda/<op>.cuh          kernels and their launch functions; includes this header first
//   csrc/cuda/<op>.cu           includes "stream.h" and "<op>.cuh"; binds to torch (nvcc only)
//   tests/ops/<op>/<name>.cpp   includes "cuda/<op>.cuh", calls the launch functions on plain
//                               memory; tests/shim compiles and runs it under ASan and UBSan:
//                               run_shim(compile_shim(path_of_cpp, tmp_path)); see
//                               tests/shim/probe.cpp
//
// In a .cuh write CUDA as usual, with three names of ours:
//   SK_LAUNCH(kernel, grid, block, smem, stream, args...)    (kernel<float, 4>) in parentheses
//   SK_DYNAMIC_SHARED(float, tile);                          tile is a float*, aligned to 16 bytes
//   SK_SHARED(float, partial, [32]);                         a static shared array
// On the CPU each thread of a block is a fiber, blocks run one after the other, and a switch
// happens only at __syncthreads, __syncwarp and warp collectives. Shared memory is 0xFF (NaN) when
// a block starts. sk_shim::for_each_order(f) runs f with the threads of a block taken in ascending,
// descending and shuffled order: a result that depends on it lacks a barrier. A barrier that not
// all threads reach, a collective with a wrong mask or lane, and a mix of collectives abort with a
// line.
//
// It checks indexing, tails, barriers and warp exchange. It says nothing about memory order, races
// inside one instruction stream, bank conflicts or speed. cp.async, mma and wgmma do not exist
// here: keep them behind `#ifdef __CUDA_ARCH__` beside a scalar path. No cooperative groups.
#pragma once

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SK_SHARED(type, name, extent) __shared__ type name extent
#define SK_DYNAMIC_SHARED(type, name)                                  \
    extern __shared__ __align__(16) unsigned char sk_dynamic_shared[]; \
    type* const name = reinterpret_cast<type*>(sk_dynamic_shared)
// Above 48 KiB a kernel has to ask for dynamic shared memory.
#define SK_LAUNCH(kernel, grid, block, smem, stream, ...)                             \
    do {                                                                              \
        if ((smem) > 48 * 1024)                                                       \
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, \
                                 static_cast<int>(smem));                             \
        kernel<<<(grid), (block), (smem), (stream)>>>(__VA_ARGS__);                   \
    } while (0)

#else

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;

#define SK_VECTOR2(name, type)                \
    struct alignas(2 * sizeof(type)) name {   \
        type x, y;                            \
    };                                        \
    inline name make_##name(type x, type y) { \
        return {x, y};                        \
    }
#define SK_VECTOR4(name, type)                                \
    struct alignas(16) name {                                 \
        type x, y, z, w;                                      \
    };                                                        \
    inline name make_##name(type x, type y, type z, type w) { \
        return {x, y, z, w};                                  \
    }
SK_VECTOR2(float2, float)
SK_VECTOR2(int2, int)
SK_VECTOR2(uint2, unsigned)
SK_VECTOR2(double2, double)
SK_VECTOR4(float4, float)
SK_VECTOR4(int4, int)
SK_VECTOR4(uint4, unsigned)
#undef SK_VECTOR2
#undef SK_VECTOR4

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace sk_shim {

constexpr size_t kStackBytes = 256 * 1024;

enum class Order { ascending, descending, shuffled };
inline Order order = Order::ascending;

// What a thread is waiting for; from `shuffle` on it is a warp collective.
enum class Wait { nothing, block, exited, shuffle, ballot, syncwarp };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    void* sanitizer_stack = nullptr;
    Wait wait = Wait::exited;
    unsigned mask = 0;        // lanes of the collective it waits for
    uint64_t sent = 0;        // its own value
    uint64_t inbox[32] = {};  // what every lane sent
    unsigned present = 0;     // lanes that sent something
};

struct SharedArray {
    void* data;
    size_t bytes;
};

struct Machine {
    std::vector<std::unique_ptr<Fiber>> fibers;
    ucontext_t scheduler;
    void* scheduler_stack = nullptr;
    const void* scheduler_bottom = nullptr;
    size_t scheduler_size = 0;
    std::function<void()> body;
    std::vector<SharedArray> shared;  // static arrays a kernel has declared so far
    std::unique_ptr<char[]> dynamic;
    size_t dynamic_bytes = 0;
    int threads = 0, live = 0, arrived = 0, current = 0;
    int votes = 0, vote_result = 0;
    unsigned long random = 1;
};

inline Machine machine;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "cpu_shim: block (%u,%u,%u) thread (%u,%u,%u): %s\n", blockIdx.x,
                 blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, what);
    std::abort();
}

// The sanitizer has to be told which stack runs; without it these do nothing.
inline void before_switch(void** save, const void* bottom, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(save, bottom, size);
#else
    (void)save, (void)bottom, (void)size;
#endif
}
inline void after_switch(void* saved, const void** bottom, size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(saved, bottom, size);
#else
    (void)saved, (void)bottom, (void)size;
#endif
}

inline Fiber& self() {
    return *machine.fibers[machine.current];
}

inline void place_thread() {
    const unsigned i = machine.current;
    threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
}

inline void to_scheduler() {
    Fiber& fiber = self();
    before_switch(&fiber.sanitizer_stack, machine.scheduler_bottom, machine.scheduler_size);
    swapcontext(&fiber.context, &machine.scheduler);
    after_switch(fiber.sanitizer_stack, &machine.scheduler_bottom, &machine.scheduler_size);
}

inline void to_fiber(int index) {
    machine.current = index;
    place_thread();
    Fiber& fiber = self();
    before_switch(&machine.scheduler_stack, fiber.stack.get(), kStackBytes);
    swapcontext(&machine.scheduler, &fiber.context);
    after_switch(machine.scheduler_stack, nullptr, nullptr);
}

inline void release_block_if_complete() {
    if (machine.live == 0 || machine.arrived < machine.live) return;
    machine.arrived = 0;
    machine.vote_result = machine.votes;
    machine.votes = 0;
    for (int i = 0; i < machine.threads; ++i)
        if (machine.fibers[i]->wait == Wait::block) machine.fibers[i]->wait = Wait::nothing;
}

inline void release_warp_if_complete(int first, unsigned mask, Wait wait) {
    unsigned present = 0;
    for (int lane = 0; lane < 32 && first + lane < machine.threads; ++lane) {
        const Fiber& fiber = *machine.fibers[first + lane];
        if (!(mask >> lane & 1) || fiber.wait == Wait::exited) continue;
        if (fiber.wait == Wait::nothing || fiber.wait == Wait::block) return;
        if (fiber.mask != mask) return;
        if (fiber.wait != wait) fail("lanes of one warp wait at different collectives");
        present |= 1u << lane;
    }
    for (int lane = 0; lane < 32; ++lane) {
        if (!(present >> lane & 1)) continue;
        Fiber& fiber = *machine.fibers[first + lane];
        for (int from = 0; from < 32; ++from)
            fiber.inbox[from] = present >> from & 1 ? machine.fibers[first + from]->sent : ~0ull;
        fiber.present = present;
        fiber.wait = Wait::nothing;
    }
}

inline void fiber_main() {
    after_switch(nullptr, &machine.scheduler_bottom, &machine.scheduler_size);
    for (;;) {
        machine.body();
        self().wait = Wait::exited;
        --machine.live;
        release_block_if_complete();
        const int first = machine.current / 32 * 32;
        for (int i = first; i < std::min(first + 32, machine.threads); ++i) {
            const Fiber& fiber = *machine.fibers[i];
            if (fiber.wait >= Wait::shuffle)
                release_warp_if_complete(first, fiber.mask, fiber.wait);
        }
        to_scheduler();
    }
}

inline int block_barrier(bool vote) {
    machine.votes += vote;
    self().wait = Wait::block;
    ++machine.arrived;
    release_block_if_complete();
    if (self().wait != Wait::nothing) to_scheduler();
    return machine.vote_result;
}

// Every lane of `mask` sends a value; on return each has what all of them sent.
inline Fiber& collective(Wait wait, unsigned mask, uint64_t value) {
    Fiber& fiber = self();
    const int lane = machine.current % 32;
    if (!(mask >> lane & 1)) fail("a warp collective whose mask leaves out the calling lane");
    fiber.wait = wait;
    fiber.mask = mask;
    fiber.sent = value;
    release_warp_if_complete(machine.current - lane, mask, wait);
    if (fiber.wait != Wait::nothing) to_scheduler();
    return fiber;
}

inline void prepare(size_t threads) {
    machine.threads = machine.live = static_cast<int>(threads);
    machine.arrived = machine.votes = 0;
    while (machine.fibers.size() < threads) {
        machine.fibers.push_back(std::make_unique<Fiber>());
        Fiber& fiber = *machine.fibers.back();
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, fiber_main, 0);
    }
    for (size_t i = 0; i < threads; ++i) machine.fibers[i]->wait = Wait::nothing;
    for (const SharedArray& array : machine.shared) std::memset(array.data, 0xFF, array.bytes);
    if (machine.dynamic) std::memset(machine.dynamic.get(), 0xFF, machine.dynamic_bytes);
}

inline void run_block() {
    std::vector<int> turns(machine.threads);
    std::iota(turns.begin(), turns.end(), 0);
    if (order == Order::descending) std::reverse(turns.begin(), turns.end());
    while (machine.live > 0) {
        if (order == Order::shuffled) {
            for (size_t i = turns.size(); i > 1; --i) {
                machine.random = machine.random * 6364136223846793005ul + 1442695040888963407ul;
                std::swap(turns[i - 1], turns[(machine.random >> 33) % i]);
            }
        }
        bool progress = false;
        for (int i : turns) {
            if (machine.fibers[i]->wait != Wait::nothing) continue;
            to_fiber(i);
            progress = true;
        }
        if (!progress) fail("deadlock: a barrier or collective that not all of its threads reach");
    }
}

inline void launch(dim3 grid, dim3 block, size_t smem, std::function<void()> body) {
    const size_t threads = size_t{block.x} * block.y * block.z;
    if (threads < 1 || threads > 1024) fail("a block of fewer than 1 or more than 1024 threads");
    if (size_t{grid.y} > 65535 || size_t{grid.z} > 65535) fail("grid.y or grid.z above 65535");
    if (grid.x < 1 || grid.y < 1 || grid.z < 1) fail("an empty grid");
    if (smem > 227 * 1024) fail("more than 227 KiB of dynamic shared memory");
    gridDim = grid;
    blockDim = block;
    machine.body = std::move(body);
    machine.dynamic_bytes = smem;
    machine.dynamic.reset(smem ? new char[smem] : nullptr);
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
                prepare(threads);
                run_block();
            }
}

template <class F>
void for_each_order(F&& f) {
    for (Order o : {Order::ascending, Order::descending, Order::shuffled}) {
        order = o;
        f();
    }
    order = Order::ascending;
}

// A static shared array; registered once, so that every later block finds it poisoned.
template <class T>
bool declare_shared(T& array) {
    machine.shared.push_back({&array, sizeof(T)});
    std::memset(&array, 0xFF, sizeof(T));
    return true;
}

template <class T>
uint64_t pack(T value) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    return bits;
}
template <class To, class From>
To bits(From value) {
    static_assert(sizeof(To) <= sizeof(From));
    To to;
    std::memcpy(static_cast<void*>(&to), &value, sizeof(To));
    return to;
}

// `source` leaves its segment of `width` lanes: the lane keeps its own value, as on a GPU.
template <class T>
T shuffle(unsigned mask, T value, int source, bool inside) {
    const int lane = machine.current % 32;
    Fiber& fiber = collective(Wait::shuffle, mask, pack(value));
    if (!inside || source == lane) return value;
    if (!(mask >> source & 1)) fail("a shuffle that reads a lane outside its mask");
    return bits<T>(fiber.inbox[source]);
}

template <class T>
struct same {
    using type = T;
};
template <class T>
using same_t = typename same<T>::type;

template <class T, class F>
T update(T* address, F&& f) {
    const T old = *address;
    *address = f(old);
    return old;
}

}  // namespace sk_shim

#define SK_SHARED(type, name, extent) \
    static type name extent;          \
    [[maybe_unused]] static const bool sk_shared_##name = sk_shim::declare_shared(name)
#define SK_DYNAMIC_SHARED(type, name) \
    type* const name = reinterpret_cast<type*>(sk_shim::machine.dynamic.get())
#define SK_LAUNCH(kernel, grid, block, smem, stream, ...) \
    ((void)(stream), sk_shim::launch(grid, block, smem, [&] { (kernel)(__VA_ARGS__); }))

#include "cpu_shim_functions.h"

#endif
