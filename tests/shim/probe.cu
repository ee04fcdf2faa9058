// nvcc sees the same source as probe.cpp; compiled, never linked.
#include "shim/probe.cuh"

template void probe::launch_row_sum(const float*, float*, int, int, int, cudaStream_t);
template void probe::launch_row_sum(const __half*, float*, int, int, int, cudaStream_t);
template void probe::launch_reverse<true>(const float*, float*, int, int, cudaStream_t);
