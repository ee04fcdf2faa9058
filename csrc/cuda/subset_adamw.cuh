// AdamW over kept entries on a GPU: norm (if asked), rates, update; no host synchronisation.
// A warp takes a chunk and walks it line by line, so nothing but the norm needs a block barrier.
#pragma once

#include "cuda/cpu_shim.h"
#include "cuda/subset_adamw_visit.cuh"

namespace sk::subset_adamw {

template <class T>
constexpr int64_t kTypeOf = kFloat;
template <>
constexpr int64_t kTypeOf<__nv_bfloat16> = kBFloat16;
template <>
constexpr int64_t kTypeOf<__half> = kHalf;

// A step's numbers for one parameter, written by `prepare`.
struct Rates {
    double clock[kClock], ticked[kClock];  // before and after this step
    double hyper[kHypers], steps;          // steps before this one
    float scale, unscale;                  // of the gradient: for the update, and for the sums
    float decay, rate1, beta2, rate2, eps;
    float step_size, inverse_root;           // by bias correction
    float sizes[kCohorts], roots[kCohorts];  // the same, by cohort
    int skip;
    int late;  // some entries joined after the first step: corrections differ by cohort
};

// Σg² of a lane's entries.
template <class G>
struct Squares {
    const G* grad_at;
    int lane;
    double total = 0;

    __device__ __forceinline__ void square(G value) {
        total += static_cast<double>(widen(value)) * widen(value);
    }
    __device__ __forceinline__ void run(int64_t, int64_t grad, int64_t, int64_t n) {
        const G* from = grad_at + grad;
        const int64_t done = aligned(from) ? n / 4 * 4 : 0;
        for (int64_t i = lane * 4; i < done; i += 4 * kWarp) {
            const Four<G> four = *reinterpret_cast<const Four<G>*>(from + i);
#pragma unroll
            for (int j = 0; j < 4; ++j) square(four.at[j]);
        }
        for (int64_t i = done + lane; i < n; i += kWarp) square(from[i]);
    }
    __device__ __forceinline__ void one(int64_t, int64_t grad, int64_t, bool kept) {
        if (kept) square(grad_at[grad]);
    }
    __device__ void begin_row(int64_t) {}
    __device__ void end_row(int64_t) {}
};

template <class P, class G>
struct Update {
    const Item& item;
    const Rates& rates;
    const int lane;
    P* const param_at;
    const G* const grad_at;
    float *const first_at, *const second_at, *const master_at;
    const uint8_t* const cohort_at;
    const bool sums, entrywise;
    const float scale, decay, rate1, beta2, rate2, eps, step_size, inverse_root;
    float missed = 1, missed1 = 1, missed2 = 1, moves = 0;  // what a touched row has waited for
    float product = 0, square = 0;                          // a lane's share of the row's sums

    // Copies of what every entry needs: a store could change the table for all the compiler knows.
    __device__ Update(const Item& item, const Rates& rates, int lane)
        : item(item),
          rates(rates),
          lane(lane),
          param_at(static_cast<P*>(item.param)),
          grad_at(static_cast<const G*>(item.grad)),
          first_at(item.exp_avg),
          second_at(item.exp_avg_sq),
          master_at(item.master),
          cohort_at(rates.late ? item.cohort : nullptr),
          sums(item.sums()),
          entrywise(item.columns == 1 && item.kind != kTouched),
          scale(rates.scale),
          decay(rates.decay),
          rate1(rates.rate1),
          beta2(rates.beta2),
          rate2(rates.rate2),
          eps(rates.eps),
          step_size(rates.step_size),
          inverse_root(rates.inverse_root) {}

    __device__ void add(float weight, float raw, int64_t param) {
        const float both = fabsf(weight * raw) * rates.unscale;
        const float own = raw * raw * (rates.unscale * rates.unscale);
        if (entrywise) {
            if (item.sum_abs) item.sum_abs[param] += both;
            if (item.sum_squared) item.sum_squared[param] += own;
        } else {
            product += both;
            square += own;
        }
    }

    // The new weight; moments in place. `param` and `state` only name the entry.
    __device__ float apply(float weight, float raw, float& first, float& second, int64_t param,
                           int64_t state) {
        if (sums) add(weight, raw, param);
        const int cohort = cohort_at ? cohort_at[state] : 0;
        const float size = cohort_at ? rates.sizes[cohort] : step_size;
        const float inverse = cohort_at ? rates.roots[cohort] : inverse_root;
        const float grad = raw * scale;
        if (moves != 0)
            weight = weight * missed - moves * (first / (sqrtf(second) + eps));
        else
            weight *= missed;
        first *= missed1;
        first += (grad - first) * rate1;
        second = beta2 * (second * missed2) + rate2 * grad * grad;
        return weight * decay - size * (first / (sqrtf(second) * inverse + eps));
    }

    __device__ __forceinline__ void one(int64_t param, int64_t grad, int64_t state, bool kept) {
        const float raw = kept ? widen(grad_at[grad]) : 0.0f;
        float first = first_at[state], second = second_at[state];
        const float old = master_at ? master_at[state] : widen(param_at[param]);
        const float now = apply(old, raw, first, second, param, state);
        first_at[state] = first;
        second_at[state] = second;
        if (master_at) master_at[state] = now;
        param_at[param] = P(now);
    }

    __device__ __forceinline__ void four(int64_t param, int64_t grad, int64_t state) {
        auto* weight = reinterpret_cast<Four<P>*>(param_at + param);
        auto* first = reinterpret_cast<Four<float>*>(first_at + state);
        auto* second = reinterpret_cast<Four<float>*>(second_at + state);
        auto* master = reinterpret_cast<Four<float>*>(master_at ? master_at + state : nullptr);
        const auto raw = *reinterpret_cast<const Four<G>*>(grad_at + grad);
        Four<float> m = *first, v = *second, w;
        Four<P> shadow;
        if (master) {
            w = *master;
        } else {
            shadow = *weight;
#pragma unroll
            for (int j = 0; j < 4; ++j) w.at[j] = widen(shadow.at[j]);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            w.at[j] = apply(w.at[j], widen(raw.at[j]), m.at[j], v.at[j], param + j, state + j);
            shadow.at[j] = P(w.at[j]);
        }
        *first = m;
        *second = v;
        if (master) *master = w;
        *weight = shadow;
    }

    __device__ __forceinline__ void run(int64_t param, int64_t grad, int64_t state, int64_t n) {
        const bool vector = aligned(param_at + param) && aligned(grad_at + grad) &&
                            aligned(first_at + state) && aligned(second_at + state) &&
                            (!master_at || aligned(master_at + state));
        const int64_t done = vector ? n / 4 * 4 : 0;
        for (int64_t i = lane * 4; i < done; i += 4 * kWarp) four(param + i, grad + i, state + i);
        for (int64_t i = done + lane; i < n; i += kWarp) one(param + i, grad + i, state + i, true);
    }

    __device__ void begin_row(int64_t row) {
        const double* clock = item.row_clock + row * kClock;
        missed = static_cast<float>(exp(rates.clock[0] - clock[0]));
        missed1 = static_cast<float>(exp(rates.clock[1] - clock[1]));
        missed2 = static_cast<float>(exp(rates.clock[2] - clock[2]));
        moves = static_cast<float>(
            warp_sum(missed_moves(rates.clock, clock, rates.hyper, rates.steps, lane + 1, kWarp)));
        __syncwarp();
    }

    __device__ void end_row(int64_t row) {
        if (item.kind == kTouched && lane < kClock)
            item.row_clock[row * kClock + lane] = rates.ticked[lane];
        if (!sums || entrywise) return;
        product = warp_sum(product);
        square = warp_sum(square);
        if (lane == 0 && item.sum_abs) item.sum_abs[row] += product;
        if (lane == 0 && item.sum_squared) item.sum_squared[row] += square;
        product = square = 0;
    }
};

// A kernel for each dtype takes the chunks that are its own.
template <class G>
__global__ void __launch_bounds__(kThreads, 2)
    sum_squares(const Item* items, const Chunk* chunks, int64_t count, double* partials) {
    const int lane = threadIdx.x % kWarp;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
    for (int64_t c = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp; c < count;
         c += warps) {
        const Chunk chunk = chunks[c];
        const Item& item = items[chunk.item];
        if (item.grad_dtype != kTypeOf<G>) continue;
        Squares<G> squares{static_cast<const G*>(item.grad), lane};
        visit(item, chunk.first, chunk.end, lane, squares);
        const double total = warp_sum(squares.total);
        if (lane == 0) partials[c] = total;
    }
}

template <class P, class G>
__global__ void __launch_bounds__(kThreads, 2)
    update(const Item* items, const Rates* rates, const Chunk* chunks, int64_t count) {
    const int lane = threadIdx.x % kWarp;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
    for (int64_t c = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp; c < count;
         c += warps) {
        const Chunk chunk = chunks[c];
        const Item& item = items[chunk.item];
        if (item.param_dtype != kTypeOf<P> || item.grad_dtype != kTypeOf<G>) continue;
        if (rates[chunk.item].skip) return;
        Update<P, G> update(item, rates[chunk.item], lane);
        visit(item, chunk.first, chunk.end, lane, update);
    }
}

// A block per parameter: the norm in a fixed order, rates, step count and clocks.
__global__ void __launch_bounds__(kThreads)
    prepare(const Item* items, int64_t parameters, const double* hyper, const double* partials,
            int64_t count, float max_grad_norm, const float* grad_scale, const float* found_inf,
            float* norm_out, Rates* rates) {
    SK_SHARED(double, warps, [kThreads / kWarp]);
    const int thread = threadIdx.x;
    const double unscale = 1.0 / (grad_scale ? *grad_scale : 1.0f);
    double total = 0;
    if (max_grad_norm > 0)
        for (int64_t c = thread; c < count; c += kThreads) total += partials[c];
    total = warp_sum(total);
    if (thread % kWarp == 0) warps[thread / kWarp] = total;
    __syncthreads();
    total = 0;
    for (int w = 0; w < kThreads / kWarp; ++w) total += warps[w];
    const float norm = static_cast<float>(sqrt(total) * fabs(unscale));
    if (blockIdx.x == 0 && thread == 0) *norm_out = norm;
    if (blockIdx.x >= parameters) return;
    const Item& item = items[blockIdx.x];
    Rates& out = rates[blockIdx.x];
    const double* row = hyper + item.group * kHypers;
    const double lr = row[kLr], beta1 = row[kBeta1], beta2 = row[kBeta2];
    const double age = *item.step + 1.0;
    const float joined = item.cohort && thread < item.cohorts ? item.cohort_start[thread] : 0.0f;
    // A barrier as well: thread 0 is about to change the step count.
    const int late = __syncthreads_or(joined != 0);
    if (late) {
        const double since = age - joined;
        out.sizes[thread] = static_cast<float>(lr / (1 - pow(beta1, since)));
        out.roots[thread] = static_cast<float>(1 / sqrt(1 - pow(beta2, since)));
    }
    if (thread != 0) return;
    out.late = late;
    const float share = max_grad_norm / (norm + 1e-6f);
    const float clip = max_grad_norm > 0 && !(share > 1) ? share : 1.0f;
    const bool skip = found_inf && *found_inf != 0;
    const double decay = 1 - lr * row[kWeightDecay];
    out.skip = skip;
    out.scale = static_cast<float>(clip * unscale);
    out.unscale = static_cast<float>(unscale);
    out.decay = static_cast<float>(decay);
    out.rate1 = static_cast<float>(1 - beta1);
    out.beta2 = static_cast<float>(beta2);
    out.rate2 = static_cast<float>(1 - beta2);
    out.eps = static_cast<float>(row[kEps]);
    out.step_size = static_cast<float>(lr / (1 - pow(beta1, age)));
    out.inverse_root = static_cast<float>(1 / sqrt(1 - pow(beta2, age)));
    if (item.kind == kTouched) {
        for (int k = 0; k < kClock; ++k) out.clock[k] = out.ticked[k] = item.clock[k];
        for (int k = 0; k < kHypers; ++k) out.hyper[k] = row[k];
        out.steps = age - 1;
        tick(out.ticked, row);
        if (!skip)
            for (int k = 0; k < kClock; ++k) item.clock[k] = out.ticked[k];
    }
    if (!skip) *item.step = static_cast<float>(age);
}

// Of entries sorted by row, `order` says where each one's values are. The first entry of a row gets
// the sum of all, in their order, and names the row; the others name none. `item` is told where.
template <class G>
__global__ void __launch_bounds__(kThreads, 4)  // else ptxas spills to stay below 33 registers
    coalesce_rows(const int64_t* rows, const int64_t* order, const G* values, int64_t n,
                  int64_t wide, int32_t* touched, float* sums, Item* item) {
    constexpr int64_t kPiece = 4 * kWarp;  // columns of a warp: a frequent row is shared by many
    const int lane = threadIdx.x % kWarp;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
    const int64_t pieces = wide > kPiece ? (wide + kPiece - 1) / kPiece : 1;
    const bool vector = wide % 4 == 0 && aligned(values) && aligned(sums);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        item->grad = sums;
        item->index = touched;
    }
    for (int64_t w = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
         w < n * pieces; w += warps) {
        const int64_t i = w / pieces, piece = w - i * pieces, row = rows[i];
        const bool first = i == 0 || rows[i - 1] != row;
        if (lane == 0 && piece == 0) touched[i] = first ? static_cast<int32_t>(row) : -1;
        if (!first) continue;
        int64_t stop = i + 1;
        for (int same = kWarp; same == kWarp; stop += same)
            same = __popc(__ballot_sync(~0u, stop + lane < n && rows[stop + lane] == row));
        const int64_t c = piece * kPiece + 4 * lane;
        if (vector && c < wide) {
            Four<float> sum{};
#pragma unroll 4
            for (int64_t j = i; j < stop; ++j) {
                const auto* from = reinterpret_cast<const Four<G>*>(values + order[j] * wide + c);
                const Four<G> four = *from;
#pragma unroll
                for (int k = 0; k < 4; ++k) sum.at[k] += widen(four.at[k]);
            }
            *reinterpret_cast<Four<float>*>(sums + i * wide + c) = sum;
        } else {
            for (int64_t k = c; k < wide && k < c + 4; ++k) {
                float sum = 0;
                for (int64_t j = i; j < stop; ++j) sum += widen(values[order[j] * wide + k]);
                sums[i * wide + k] = sum;
            }
        }
    }
}

inline int blocks_for(int64_t warps, int most) {
    const int64_t blocks = (warps + kThreads / kWarp - 1) / (kThreads / kWarp);
    return static_cast<int>(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

// What a step works on; all pointers on the device.
struct Launch {
    const Item* items;
    int64_t parameters;
    const Chunk* chunks;
    int64_t count;   // of chunks
    int64_t dtypes;  // bit 3 p + g where an item has param_dtype p and grad_dtype g
    Rates* rates;    // one per parameter
    int most;        // blocks that are resident at once
    cudaStream_t stream;

    template <class G>
    void norm(double* partials) const {
        if (dtypes >> kTypeOf<G> & 0111)
            SK_LAUNCH(sum_squares<G>, blocks_for(count, most), kThreads, 0, stream, items, chunks,
                      count, partials);
    }
    template <class P, class G>
    void update_entries() const {
        if (dtypes >> (3 * kTypeOf<P> + kTypeOf<G>)&1)
            SK_LAUNCH((update<P, G>), blocks_for(count, most), kThreads, 0, stream, items, rates,
                      chunks, count);
    }
};

inline void launch_step(const Launch& on, const double* hyper, double* partials, float* norm,
                        float max_grad_norm, const float* grad_scale, const float* found_inf) {
    if (max_grad_norm > 0) {
        on.norm<float>(partials);
        on.norm<__nv_bfloat16>(partials);
        on.norm<__half>(partials);
    }
    SK_LAUNCH(prepare, static_cast<unsigned>(on.parameters > 1 ? on.parameters : 1), kThreads, 0,
              on.stream, on.items, on.parameters, hyper, partials, on.count, max_grad_norm,
              grad_scale, found_inf, norm, on.rates);
    on.update_entries<float, float>();
    on.update_entries<__nv_bfloat16, float>();
    on.update_entries<__nv_bfloat16, __nv_bfloat16>();
    on.update_entries<__half, float>();
    on.update_entries<__half, __half>();
}

}  // namespace sk::subset_adamw
