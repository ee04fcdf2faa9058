// A kernel for each thing the shim offers; compiled by g++ (test_shim.py) and by nvcc.
#pragma once

#include "cuda/cpu_shim.h"

namespace probe {

__device__ __forceinline__ float warp_sum(float v) {
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
    return v;
}

// out[row] = sum of a row of x [rows, columns]; a persistent grid, a tail in both directions.
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    row_sum(const T* __restrict__ x, float* __restrict__ out, int rows, int columns) {
    SK_SHARED(float, partial, [kThreads / 32]);
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        float sum = 0.0f;
        for (int c = threadIdx.x; c < columns; c += kThreads)
            sum += static_cast<float>(x[static_cast<int64_t>(row) * columns + c]);
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
        __syncthreads();
        if (threadIdx.x < 32) {
            sum = warp_sum(threadIdx.x < kThreads / 32 ? partial[threadIdx.x] : 0.0f);
            if (threadIdx.x == 0) out[row] = sum;
        }
        __syncthreads();
    }
}

// Each block reverses its tile through dynamic shared memory. `kBarrier` false is a race.
template <bool kBarrier>
__global__ void reverse_tiles(const float* x, float* out) {
    SK_DYNAMIC_SHARED(float, tile);
    const int base = blockIdx.x * blockDim.x;
    tile[threadIdx.x] = x[base + threadIdx.x];
    if (kBarrier) __syncthreads();
    out[base + threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

// Stable compaction of the positive entries of one block, by ballot; 1 + the last kept in `count`.
__global__ void compact_positive(const float* x, int n, int* kept, int* count) {
    SK_SHARED(int, offset, [33]);
    const int i = threadIdx.x, lane = i % 32, warp = i / 32, warps = blockDim.x / 32;
    const bool keep = i < n && x[i] > 0.0f;
    const unsigned votes = __ballot_sync(~0u, keep);
    if (lane == 0) offset[warp + 1] = __popc(votes);
    if (i == 0) offset[0] = 0;
    __syncthreads();
    if (i == 0)
        for (int w = 0; w < warps; ++w) offset[w + 1] += offset[w];
    __syncthreads();
    if (keep) {
        const int place = offset[warp] + __popc(votes & ((1u << lane) - 1));
        kept[place] = i;
        atomicMax(count, place + 1);
    }
}

__global__ void divergent_barrier() {
    if (threadIdx.x % 32 < 16)
        __syncthreads();
    else
        __syncwarp();
}

__global__ void half_mask() {
    if (threadIdx.x < 16) __shfl_sync(0xFFFF0000u, 1, 0);
}

__global__ void read_past_end(const float* x, float* out) {
    out[0] = x[threadIdx.x];
}

template <class T>
void launch_row_sum(const T* x, float* out, int rows, int columns, int blocks,
                    cudaStream_t stream) {
    SK_LAUNCH((row_sum<T, 96>), blocks, 96, 0, stream, x, out, rows, columns);
}

template <bool kBarrier>
void launch_reverse(const float* x, float* out, int tiles, int width, cudaStream_t stream) {
    SK_LAUNCH(reverse_tiles<kBarrier>, tiles, width, width * sizeof(float), stream, x, out);
}

}  // namespace probe
