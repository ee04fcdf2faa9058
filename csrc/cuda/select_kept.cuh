// Exactly the k best of many entries, as packed bits, with no host in the loop.
//
// Two passes over the data: a histogram of the top 12 bits of the keys, then bits of everything
// above the boundary bin while that bin's entries are listed. The rest is ranked digit by digit in
// the list, ties by entry number. Should the list overflow, the data are read again in its place.
#pragma once

#include "cuda/group_reduce.cuh"

namespace sk::select_kept {

using group_reduce::kThreads;
using group_reduce::kUnit;
using group_reduce::kWarp;
using group_reduce::kWarps;

enum Score : int { kValue, kAbsValue, kAbsWG, kGradSquared, kScores };

constexpr int kSources = 448;  // sources travel as a kernel argument: at most 32,764 bytes
constexpr int kBins = 4096, kTile = kThreads * kUnit;
constexpr int64_t kPiece = 16 * kTile;
constexpr int kDigits = 6;
constexpr int64_t kMostEntries = int64_t{1} << 33;

// Bits [shift, shift + width) of a key (digits 0 to 2) or of a reversed entry number (3 to 5).
struct Digit {
    int shift, width;
};
__host__ __device__ inline Digit digit_of(int d) {
    return d == 0 ? Digit{20, 12} : d < 3 ? Digit{20 - 10 * d, 10} : Digit{55 - 11 * d, 11};
}

struct Source {
    int64_t value, grad;
    int64_t numel, entry0, piece0, k;
    uint8_t* bits;
    int32_t selection;
    int16_t value_type, grad_type;
};

struct Sources {
    Source at[kSources];
    int count, score;
    int64_t pieces;
};

struct State {
    int64_t need;    // entries still to be found among those that share the prefix
    uint64_t entry;  // reversed entry number of the last one kept
    uint32_t key;    // its key
    int32_t none;    // k is 0
};

struct Candidate {
    int64_t entry;
    uint32_t key;
    int32_t source;  // among all batches
};

struct Buffers {
    State* states;
    unsigned long long* histograms;  // [selections, kBins]
    unsigned long long* listed;      // one counter
    Candidate* list;
    int64_t capacity;
    unsigned long long* counts;  // [sources]
    float* thresholds;           // [selections]
    int selections;
    int source0;  // of this batch among all
};

__device__ __forceinline__ uint32_t key_of(float score) {
    score += 0.0f;
    const uint32_t bits = __float_as_uint(score);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0;
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float score_of(uint32_t key) {
    return __uint_as_float(key == 0 ? 0x7fc00000u : key >> 31 ? key & 0x7fffffffu : ~key);
}

__device__ __forceinline__ uint64_t reversed(int64_t entry) {
    return (uint64_t)(kMostEntries - 1 - entry);
}

// Keys of up to eight entries of a source.
__device__ __forceinline__ int load_keys(const Source& s, int score, int64_t at,
                                         uint32_t (&keys)[kUnit]) {
    const int64_t n = s.numel - at;
    if (n <= 0) return 0;
    float v[kUnit], g[kUnit];
    if (score != kGradSquared) group_reduce::load_unit(s.value, s.value_type, at, n, v);
    if (score >= kAbsWG) group_reduce::load_unit(s.grad, s.grad_type, at, n, g);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
        const float x = score == kValue      ? v[i]
                        : score == kAbsValue ? fabsf(v[i])
                        : score == kAbsWG    ? fabsf(v[i] * g[i])
                                             : g[i] * g[i];
        keys[i] = key_of(x);
    }
    return n < kUnit ? (int)n : kUnit;
}

__device__ __forceinline__ int source_of(const Sources& sources, int64_t piece) {
    int low = 0, high = sources.count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (sources.at[middle].piece0 <= piece)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

// Calls body(source index, entry of this thread's unit) for every tile of this block's pieces; all
// threads of the block call it alike. before(selection) runs when the selection changes.
template <class Before, class Body>
__device__ __forceinline__ void each_unit(const Sources& sources, Before before, Body body) {
    const int64_t first = sources.pieces * blockIdx.x / gridDim.x;
    const int64_t last = sources.pieces * (blockIdx.x + 1) / gridDim.x;
    int selection = -1;
    for (int64_t piece = first; piece < last; ++piece) {
        const int index = source_of(sources, piece);
        const Source& s = sources.at[index];
        if (s.selection != selection) before(selection = s.selection);
        const int64_t start = (piece - s.piece0) * kPiece;
        for (int64_t tile = start; tile < min(start + kPiece, s.numel); tile += kTile)
            body(index, tile + kUnit * threadIdx.x);
    }
}

__global__ void initialize(Sources sources, Buffers b) {
    const int64_t step = (int64_t)gridDim.x * kThreads;
    const int64_t rank = (int64_t)blockIdx.x * kThreads + threadIdx.x;
    for (int64_t i = rank; i < (int64_t)b.selections * kBins; i += step) b.histograms[i] = 0;
    for (int64_t i = rank; i < sources.count; i += step) {
        const Source& s = sources.at[i];
        b.counts[b.source0 + i] = 0;
        if (i && sources.at[i - 1].selection == s.selection) continue;
        b.states[s.selection] = State{s.k, 0, 0, s.k == 0};
    }
    if (rank == 0) *b.listed = 0;
}

__device__ __forceinline__ void flush(unsigned* shared, unsigned long long* out) {
    __syncthreads();
    for (int i = threadIdx.x; i < kBins; i += kThreads) {
        if (shared[i]) atomicAdd(out + i, (unsigned long long)shared[i]);
        shared[i] = 0;
    }
    __syncthreads();
}

// Digit 0, from the data.
__global__ void __launch_bounds__(kThreads) count_keys(Sources sources, Buffers b) {
    SK_SHARED(unsigned, bins, [kBins]);
    for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
    int current = -1;
    each_unit(
        sources,
        [&](int selection) {
            if (current >= 0)
                flush(bins, b.histograms + (int64_t)current * kBins);
            else
                __syncthreads();
            current = selection;
        },
        [&](int index, int64_t at) {
            uint32_t keys[kUnit];
            const int n = load_keys(sources.at[index], sources.score, at, keys);
#pragma unroll
            for (int i = 0; i < kUnit; ++i)
                if (i < n) atomicAdd(bins + (keys[i] >> 20), 1u);
        });
    if (current >= 0) flush(bins, b.histograms + (int64_t)current * kBins);
}

// One block per selection: the bin that holds the last entry kept. Clears the histogram.
__global__ void __launch_bounds__(kThreads) narrow(Buffers b, int d) {
    constexpr int kRun = kBins / kThreads;
    SK_SHARED(unsigned long long, totals, [kThreads]);
    unsigned long long* bins = b.histograms + (int64_t)blockIdx.x * kBins + kRun * threadIdx.x;
    unsigned long long total = 0;
    for (int i = 0; i < kRun; ++i) total += bins[i];
    totals[threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.x == 0) {
        State& state = b.states[blockIdx.x];
        if (!state.none) {
            unsigned long long need = (unsigned long long)state.need;
            int run = kThreads - 1;
            for (; run > 0 && totals[run] < need; --run) need -= totals[run];
            const unsigned long long* first = b.histograms + (int64_t)blockIdx.x * kBins;
            int bin = kRun * run + kRun - 1;
            for (; bin > kRun * run && first[bin] < need; --bin) need -= first[bin];
            state.need = (int64_t)need;
            if (d < 3)
                state.key |= (uint32_t)bin << digit_of(d).shift;
            else
                state.entry |= (uint64_t)bin << digit_of(d).shift;
            if (d == 2) b.thresholds[blockIdx.x] = score_of(state.key);
        } else {
            b.thresholds[blockIdx.x] = __uint_as_float(0x7f800000u);
        }
    }
    __syncthreads();
    for (int i = 0; i < kRun; ++i) bins[i] = 0;
}

// Sum over the block, and what comes before this thread in it.
__device__ __forceinline__ int before_in_block(int value, int* shared, int& total) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    int scan = value;
    for (int step = 1; step < kWarp; step *= 2) {
        const int other = __shfl_up_sync(~0u, scan, step);
        if (lane >= step) scan += other;
    }
    if (lane == kWarp - 1) shared[warp] = scan;
    __syncthreads();
    int before = 0;
    total = 0;
    for (int i = 0; i < kWarps; ++i) {
        if (i < warp) before += shared[i];
        total += shared[i];
    }
    __syncthreads();
    return before + scan - value;
}

// Bits of the entries above the boundary bin; the entries inside it are listed.
__global__ void __launch_bounds__(kThreads) write_bits(Sources sources, Buffers b) {
    SK_SHARED(int, shared, [kWarps]);
    SK_SHARED(unsigned long long, slot, [1]);
    uint32_t boundary = 0;
    bool none = false;
    each_unit(
        sources,
        [&](int selection) {
            boundary = b.states[selection].key >> 20;
            none = b.states[selection].none;
        },
        [&](int index, int64_t at) {
            const Source& s = sources.at[index];
            uint32_t keys[kUnit];
            const int n = load_keys(s, sources.score, at, keys);
            unsigned above = 0, inside = 0;
#pragma unroll
            for (int i = 0; i < kUnit; ++i) {
                if (i >= n || none) continue;
                above |= (unsigned)(keys[i] >> 20 > boundary) << i;
                inside |= (unsigned)(keys[i] >> 20 == boundary) << i;
            }
            if (n > 0) s.bits[at / 8] = (uint8_t)above;
            int kept, listed;
            before_in_block(__popc(above), shared, kept);
            const int mine = before_in_block(__popc(inside), shared, listed);
            if (threadIdx.x == 0) {
                if (kept) atomicAdd(b.counts + b.source0 + index, (unsigned long long)kept);
                if (listed) slot[0] = atomicAdd(b.listed, (unsigned long long)listed);
            }
            __syncthreads();
            int64_t to = (int64_t)slot[0] + mine;
#pragma unroll
            for (int i = 0; i < kUnit; ++i)
                if (inside >> i & 1) {
                    if (to < b.capacity)
                        b.list[to] = Candidate{s.entry0 + at + i, keys[i], b.source0 + index};
                    ++to;
                }
        });
}

// Calls body(source of this batch, entry within it, key) for the entries of the boundary bins.
template <class Body>
__device__ __forceinline__ void each_candidate(const Sources& sources, const Buffers& b,
                                               Body body) {
    const int64_t listed = (int64_t)*b.listed;
    if (listed <= b.capacity) {
        const int64_t step = (int64_t)gridDim.x * kThreads;
        for (int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x; i < listed; i += step) {
            const Candidate c = b.list[i];
            const int index = c.source - b.source0;
            if (index >= 0 && index < sources.count)
                body(index, c.entry - sources.at[index].entry0, c.key);
        }
        return;
    }
    each_unit(
        sources, [](int) {},
        [&](int index, int64_t at) {
            const Source& s = sources.at[index];
            const State& state = b.states[s.selection];
            uint32_t keys[kUnit];
            const int n = load_keys(s, sources.score, at, keys);
#pragma unroll
            for (int i = 0; i < kUnit; ++i)
                if (i < n && !state.none && keys[i] >> 20 == state.key >> 20)
                    body(index, at + i, keys[i]);
        });
}

// A later digit of the boundary bins' entries.
__global__ void __launch_bounds__(kThreads, 2) count_candidates(Sources sources, Buffers b, int d) {
    const Digit digit = digit_of(d);
    each_candidate(sources, b, [&](int index, int64_t at, uint32_t key) {
        const Source& s = sources.at[index];
        const State& state = b.states[s.selection];
        const int top = digit.shift + digit.width;
        unsigned bin;
        if (d < 3) {
            if (key >> top != state.key >> top) return;
            bin = key >> digit.shift;
        } else {
            const uint64_t entry = reversed(s.entry0 + at);
            if (key != state.key || entry >> top != state.entry >> top) return;
            bin = (unsigned)(entry >> digit.shift);
        }
        bin &= (1u << digit.width) - 1;
        atomicAdd(b.histograms + (int64_t)s.selection * kBins + bin, 1ull);
    });
}

// Sets the bits of the candidates kept.
__global__ void __launch_bounds__(kThreads) keep_candidates(Sources sources, Buffers b) {
    each_candidate(sources, b, [&](int index, int64_t at, uint32_t key) {
        const Source& s = sources.at[index];
        const State& state = b.states[s.selection];
        if (key < state.key || (key == state.key && reversed(s.entry0 + at) < state.entry)) return;
        const int64_t byte = at / 8;
        unsigned* word = reinterpret_cast<unsigned*>(s.bits + byte / 4 * 4);
        atomicOr(word, 1u << (byte % 4 * 8 + at % 8));
        atomicAdd(b.counts + b.source0 + index, 1ull);
    });
}

// `batches` of at most kSources sources each; a selection may span batches.
inline void launch(const Sources* batches, int n_batches, Buffers b, int resident,
                   cudaStream_t stream) {
    const auto grid = [&](int64_t work) {
        return dim3((unsigned)(work < resident ? work : resident));
    };
    const auto each_batch = [&](const auto& run) {
        b.source0 = 0;
        for (int i = 0; i < n_batches; b.source0 += batches[i].count, ++i) run(batches[i]);
    };
    const dim3 block(kThreads);
    each_batch([&](const Sources& s) {
        SK_LAUNCH(initialize, dim3((unsigned)resident), block, 0, stream, s, b);
    });
    each_batch([&](const Sources& s) {
        if (s.pieces) SK_LAUNCH(count_keys, grid(s.pieces), block, 0, stream, s, b);
    });
    SK_LAUNCH(narrow, dim3((unsigned)b.selections), block, 0, stream, b, 0);
    each_batch([&](const Sources& s) {
        if (s.pieces) SK_LAUNCH(write_bits, grid(s.pieces), block, 0, stream, s, b);
    });
    for (int d = 1; d < kDigits; ++d) {
        each_batch([&](const Sources& s) {
            SK_LAUNCH(count_candidates, dim3((unsigned)resident), block, 0, stream, s, b, d);
        });
        SK_LAUNCH(narrow, dim3((unsigned)b.selections), block, 0, stream, b, d);
    }
    each_batch([&](const Sources& s) {
        SK_LAUNCH(keep_candidates, dim3((unsigned)resident), block, 0, stream, s, b);
    });
}

}  // namespace sk::select_kept
