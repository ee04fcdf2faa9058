// Chunks met in an order are taken while they fit; what does not fit is skipped. No host in it.
#pragma once

#include "cuda/cpu_shim.h"

namespace sk::select_units {

constexpr int kThreads = 1024, kWarp = 32, kWarps = kThreads / kWarp;
constexpr int kNever = 0x7fffffff;

struct Fill {
    const double* cost;  // [n], in the order they are met
    const int64_t* segment;
    const bool* free;
    const double* left;  // [1]
    bool* chosen;
    int* ended;  // [segments]: where a segment met what did not fit
    int64_t n;
    int segments;
    bool prefix;  // what does not fit ends its segment
};

// Inclusive sums over the block; all threads call it.
__device__ __forceinline__ double sums_to_here(double value, double* shared) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    for (int step = 1; step < kWarp; step *= 2) {
        const double other = __shfl_up_sync(~0u, value, step);
        if (lane >= step) value += other;
    }
    if (lane == kWarp - 1) shared[warp] = value;
    __syncthreads();
    if (warp == 0) {
        double total = shared[lane];
        for (int step = 1; step < kWarp; step *= 2) {
            const double other = __shfl_up_sync(~0u, total, step);
            if (lane >= step) total += other;
        }
        shared[lane] = total;
    }
    __syncthreads();
    if (warp) value += shared[warp - 1];
    __syncthreads();
    return value;
}

// One block walks the order, kThreads chunks at a time. Within these, rounds: everything before
// the first that does not fit is taken at once. A round leaves less room, so few rounds follow.
// Sums of integers below 2^53 are exact, whatever their order.
__global__ void __launch_bounds__(kThreads) fill_in_order(Fill f) {
    SK_SHARED(double, shared, [kWarps]);
    SK_SHARED(int, first, [1]);
    SK_SHARED(int, waiting, [1]);
    SK_SHARED(double, room, [1]);
    const int t = (int)threadIdx.x;
    for (int64_t s = t; s < f.segments; s += kThreads) f.ended[s] = kNever;
    if (t == 0) room[0] = *f.left;
    __syncthreads();
    for (int64_t base = 0; base < f.n; base += kThreads) {
        const int64_t i = base + t;
        // A chunk of a segment there is not, or of no known cost, is not taken.
        const int64_t segment = i < f.n ? f.segment[i] : 0;
        const double cost = i < f.n ? f.cost[i] : 0;
        const bool owned = segment >= 0 && segment < f.segments && cost >= 0;
        const bool real = i < f.n && f.free[i] && owned;
        bool waits = real, taken = false;
        for (;;) {
            const double left = room[0];
            if (t == 0) first[0] = kThreads, waiting[0] = 0;
            // A segment that ended before this chunk was met takes nothing more.
            if (waits && f.prefix && cost > left) atomicMin(f.ended + segment, (int)i);
            __syncthreads();
            if (waits && (cost > left || (f.prefix && f.ended[segment] < i))) waits = false;
            const double spent = sums_to_here(waits ? cost : 0.0, shared);
            const bool fits = spent <= left;
            if (waits && !fits) atomicMin(first, t);
            __syncthreads();
            const int stop = first[0];
            if (waits && t < stop) taken = true, waits = false;
            if (waits) atomicOr(waiting, 1);
            if (t == stop - 1) room[0] = left - spent;
            __syncthreads();
            const int more = waiting[0];
            __syncthreads();
            if (!more) break;
        }
        if (i < f.n) f.chosen[i] = taken;
    }
}

inline void launch(const Fill& f, cudaStream_t stream) {
    if (f.n) SK_LAUNCH(fill_in_order, dim3(1), dim3(kThreads), 0, stream, f);
}

}  // namespace sk::select_units
