// AdamW over kept entries on a GPU: norm (if asked), rates, update; no host synchronisation.
// A warp takes a chunk and walks it line by line, so nothing but the norm needs a block barrier.
#pragma once

#include "cuda/cpu_shim.h"
#include "cuda/subset_adamw_visit.cuh"

namespace sk::subset_adamw {

// A step's numbers for one parameter, written by `prepare`.
struct Rates {
    double clock[3], ticked[3];  // before and after this step
    float scale, unscale;        // of the gradient: for the update, and for the sums
    float decay, rate1, beta2, rate2, eps;
    float step_size, inverse_root;
    float lr, log_beta1, log_beta2, age;  // for cohorts
    int skip;
};

// Σg² of a lane's entries. The type is looked at per run, so that `visit` is compiled once.
struct Squares {
    const Item& item;
    int lane;
    double total = 0;

    __device__ __forceinline__ void square(float value) {
        total += static_cast<double>(value) * value;
    }
    template <class G>
    __device__ __forceinline__ void run_of(int64_t grad, int64_t n) {
        const G* from = static_cast<const G*>(item.grad) + grad;
        const int64_t done = aligned(from) ? n / 4 * 4 : 0;
        for (int64_t i = lane * 4; i < done; i += 4 * kWarp) {
            const Four<G> four = *reinterpret_cast<const Four<G>*>(from + i);
#pragma unroll
            for (int j = 0; j < 4; ++j) square(widen(four.at[j]));
        }
        for (int64_t i = done + lane; i < n; i += kWarp) square(widen(from[i]));
    }
    __device__ __forceinline__ void add(int64_t grad) {
        if (item.grad_dtype == kFloat) {
            square(static_cast<const float*>(item.grad)[grad]);
        } else if (item.grad_dtype == kBFloat16) {
            square(widen(static_cast<const __nv_bfloat16*>(item.grad)[grad]));
        } else {
            square(widen(static_cast<const __half*>(item.grad)[grad]));
        }
    }
    __device__ void run(int64_t, int64_t grad, int64_t, int64_t n) {
        if (item.grad_dtype == kFloat) {
            run_of<float>(grad, n);
        } else if (item.grad_dtype == kBFloat16) {
            run_of<__nv_bfloat16>(grad, n);
        } else {
            run_of<__half>(grad, n);
        }
    }
    __device__ void gathered(int64_t param, int64_t, const int32_t* index, int64_t n) {
        for (int64_t i = lane; i < n; i += kWarp) add(param + index[i]);
    }
    __device__ void entry(int64_t param, int64_t, bool live, bool kept) {
        if (live && kept) add(param);
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
    const float scale, rate1, beta2, rate2, eps, step_size, inverse_root;
    float decay, missed1 = 1, missed2 = 1;  // what a touched row has waited for
    float product = 0, square = 0;          // a lane's share of the row's sums

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
          cohort_at(item.cohort),
          sums(item.sums()),
          entrywise(item.columns == 1 && item.kind != kTouched),
          scale(rates.scale),
          rate1(rates.rate1),
          beta2(rates.beta2),
          rate2(rates.rate2),
          eps(rates.eps),
          step_size(rates.step_size),
          inverse_root(rates.inverse_root),
          decay(rates.decay) {}

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
        float size = step_size, inverse = inverse_root;
        if (cohort_at) {
            const float age = rates.age - item.cohort_start[cohort_at[state]];
            size = rates.lr / -expm1f(age * rates.log_beta1);
            inverse = 1.0f / sqrtf(-expm1f(age * rates.log_beta2));
        }
        const float grad = raw * scale;
        first *= missed1;
        first += (grad - first) * rate1;
        second = beta2 * (second * missed2) + rate2 * grad * grad;
        return weight * decay - size * (first / (sqrtf(second) * inverse + eps));
    }

    __device__ void one(int64_t param, int64_t grad, int64_t state, bool kept) {
        const float raw = kept ? widen(grad_at[grad]) : 0.0f;
        float first = first_at[state], second = second_at[state];
        const float old = master_at ? master_at[state] : widen(param_at[param]);
        const float now = apply(old, raw, first, second, param, state);
        first_at[state] = first;
        second_at[state] = second;
        if (master_at) master_at[state] = now;
        param_at[param] = P(now);
    }

    template <bool kMaster>
    __device__ __forceinline__ void four(int64_t param, int64_t grad, int64_t state) {
        auto* weight = reinterpret_cast<Four<P>*>(param_at + param);
        auto* first = reinterpret_cast<Four<float>*>(first_at + state);
        auto* second = reinterpret_cast<Four<float>*>(second_at + state);
        auto* master = reinterpret_cast<Four<float>*>(master_at + (kMaster ? state : 0));
        const auto raw = *reinterpret_cast<const Four<G>*>(grad_at + grad);
        Four<float> m = *first, v = *second, w;
        Four<P> shadow;
        if (kMaster) {
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
        if (kMaster) *master = w;
        *weight = shadow;
    }

    __device__ __forceinline__ void run(int64_t param, int64_t grad, int64_t state, int64_t n) {
        const bool vector = aligned(param_at + param) && aligned(grad_at + grad) &&
                            aligned(first_at + state) && aligned(second_at + state) &&
                            (!master_at || aligned(master_at + state));
        const int64_t done = vector ? n / 4 * 4 : 0;
        if (master_at) {
            for (int64_t i = lane * 4; i < done; i += 4 * kWarp)
                four<true>(param + i, grad + i, state + i);
        } else {
            for (int64_t i = lane * 4; i < done; i += 4 * kWarp)
                four<false>(param + i, grad + i, state + i);
        }
        for (int64_t i = done + lane; i < n; i += kWarp) one(param + i, grad + i, state + i, true);
    }

    __device__ void gathered(int64_t param, int64_t state, const int32_t* index, int64_t n) {
        for (int64_t i = lane; i < n; i += kWarp)
            one(param + index[i], param + index[i], state + i, true);
    }

    __device__ void entry(int64_t param, int64_t state, bool live, bool kept) {
        if (live) one(param, param, state, kept);
    }

    __device__ void begin_row(int64_t row) {
        const double* clock = item.row_clock + row * 3;
        decay = rates.decay * static_cast<float>(exp(rates.clock[0] - clock[0]));
        missed1 = static_cast<float>(exp(rates.clock[1] - clock[1]));
        missed2 = static_cast<float>(exp(rates.clock[2] - clock[2]));
        __syncwarp();
    }

    __device__ void end_row(int64_t row) {
        if (item.kind == kTouched && lane < 3) item.row_clock[row * 3 + lane] = rates.ticked[lane];
        if (!sums || entrywise) return;
        product = warp_sum(product);
        square = warp_sum(square);
        if (lane == 0 && item.sum_abs) item.sum_abs[row] += product;
        if (lane == 0 && item.sum_squared) item.sum_squared[row] += square;
        product = square = 0;
    }
};

template <class P, class G>
__device__ __forceinline__ void chunk_update(const Item& item, const Rates& rates,
                                             const Chunk& chunk, int lane) {
    Update<P, G> update(item, rates, lane);
    visit(item, chunk.first, chunk.end, lane, update);
}

__global__ void __launch_bounds__(kThreads, 2)
    sum_squares(const Item* items, const Chunk* chunks, int64_t count, double* partials) {
    const int lane = threadIdx.x % kWarp;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
    for (int64_t c = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp; c < count;
         c += warps) {
        const Chunk chunk = chunks[c];
        const Item& item = items[chunk.item];
        Squares squares{item, lane};
        visit(item, chunk.first, chunk.end, lane, squares);
        const double total = warp_sum(squares.total);
        if (lane == 0) partials[c] = total;
    }
}

// One block: the norm in a fixed order, every parameter's rates, step counts and clocks.
__global__ void __launch_bounds__(kThreads)
    prepare(const Item* items, int64_t parameters, const double* hyper, const double* partials,
            int64_t count, float max_grad_norm, const float* grad_scale, const float* found_inf,
            float* norm_out, Rates* rates) {
    SK_SHARED(double, warps, [kThreads / kWarp]);
    const double unscale = 1.0 / (grad_scale ? *grad_scale : 1.0f);
    double total = 0;
    if (max_grad_norm > 0)
        for (int64_t c = threadIdx.x; c < count; c += kThreads) total += partials[c];
    total = warp_sum(total);
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = total;
    __syncthreads();
    total = 0;
    for (int w = 0; w < kThreads / kWarp; ++w) total += warps[w];
    const float norm = static_cast<float>(sqrt(total) * fabs(unscale));
    if (threadIdx.x == 0) *norm_out = norm;
    const float share = max_grad_norm / (norm + 1e-6f);
    const float clip = max_grad_norm > 0 && !(share > 1) ? share : 1.0f;
    const bool skip = found_inf && *found_inf != 0;
    for (int64_t i = threadIdx.x; i < parameters; i += kThreads) {
        const Item& item = items[i];
        const double* row = hyper + item.group * kHypers;
        const double lr = row[kLr], beta1 = row[kBeta1], beta2 = row[kBeta2];
        const double decay = 1 - lr * row[kWeightDecay], age = *item.step + 1.0;
        const double logs[3] = {log(fmax(decay, kTiny)), log(fmax(beta1, kTiny)),
                                log(fmax(beta2, kTiny))};
        Rates& out = rates[i];
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
        out.lr = static_cast<float>(lr);
        out.log_beta1 = static_cast<float>(logs[1]);
        out.log_beta2 = static_cast<float>(logs[2]);
        out.age = static_cast<float>(age);
        if (item.kind == kTouched) {
            for (int k = 0; k < 3; ++k) {
                out.clock[k] = item.clock[k];
                out.ticked[k] = item.clock[k] + logs[k];
                if (!skip) item.clock[k] = out.ticked[k];
            }
        }
        if (!skip) *item.step = static_cast<float>(age);
    }
}

__global__ void __launch_bounds__(kThreads, 2)
    update(const Item* items, const Rates* rates, const Chunk* chunks, int64_t count) {
    const int lane = threadIdx.x % kWarp;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
    for (int64_t c = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp; c < count;
         c += warps) {
        const Chunk chunk = chunks[c];
        const Item& item = items[chunk.item];
        const Rates& rate = rates[chunk.item];
        if (rate.skip) return;
        const bool wide = item.grad_dtype == kFloat;
        if (item.param_dtype == kFloat) {
            chunk_update<float, float>(item, rate, chunk, lane);
        } else if (item.param_dtype == kBFloat16) {
            if (wide) {
                chunk_update<__nv_bfloat16, float>(item, rate, chunk, lane);
            } else {
                chunk_update<__nv_bfloat16, __nv_bfloat16>(item, rate, chunk, lane);
            }
        } else if (wide) {
            chunk_update<__half, float>(item, rate, chunk, lane);
        } else {
            chunk_update<__half, __half>(item, rate, chunk, lane);
        }
    }
}

// Sorted `rows` with the entries' `order` and the `place` of each row among the distinct ones: the
// first entry of a row sums them all, in order. `touched` holds -1 before.
template <class G>
__global__ void __launch_bounds__(kThreads)
    coalesce_rows(const int64_t* rows, const int64_t* order, const int64_t* place, const G* values,
                  int64_t n, int64_t wide, int32_t* touched, float* sums) {
    const int lane = threadIdx.x % kWarp;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
    for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp; i < n;
         i += warps) {
        if (i && rows[i] == rows[i - 1]) continue;
        const int64_t to = place[i];
        if (lane == 0) touched[to] = static_cast<int32_t>(rows[i]);
        for (int64_t c = lane; c < wide; c += kWarp) {
            float sum = 0;
            for (int64_t j = i; j < n && rows[j] == rows[i]; ++j)
                sum += widen(values[order[j] * wide + c]);
            sums[to * wide + c] = sum;
        }
    }
}

inline int blocks_for(int64_t warps, int most) {
    const int64_t blocks = (warps + kThreads / kWarp - 1) / (kThreads / kWarp);
    return static_cast<int>(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

// All pointers on the device. `most` blocks are resident at once; `rates` has one per parameter.
inline void launch_step(const Item* items, int64_t parameters, const Chunk* chunks, int64_t count,
                        const double* hyper, double* partials, float* norm, float max_grad_norm,
                        const float* grad_scale, const float* found_inf, Rates* rates, int most,
                        cudaStream_t stream) {
    const int blocks = blocks_for(count, most);
    if (max_grad_norm > 0)
        SK_LAUNCH(sum_squares, blocks, kThreads, 0, stream, items, chunks, count, partials);
    SK_LAUNCH(prepare, 1, kThreads, 0, stream, items, parameters, hyper, partials, count,
              max_grad_norm, grad_scale, found_inf, norm, rates);
    if (count) SK_LAUNCH(update, blocks, kThreads, 0, stream, items, rates, chunks, count);
}

}  // namespace sk::subset_adamw
