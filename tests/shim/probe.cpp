#include "shim/probe.cuh"

#include <string>

#define CHECK(condition)                                                 \
    do {                                                                 \
        if (!(condition)) {                                              \
            std::fprintf(stderr, "line %d: %s\n", __LINE__, #condition); \
            std::exit(1);                                                \
        }                                                                \
    } while (0)

template <class T>
void row_sums() {
    constexpr int kRows = 7, kColumns = 205;
    std::vector<T> x;
    for (int i = 0; i < kRows * kColumns; ++i) x.push_back(T(static_cast<float>(i % 13)));
    for (int blocks : {1, 3, kRows, 20}) {
        std::vector<float> out(kRows, NAN);
        probe::launch_row_sum(x.data(), out.data(), kRows, kColumns, blocks, nullptr);
        for (int r = 0; r < kRows; ++r) {
            float expected = 0;
            for (int c = 0; c < kColumns; ++c)
                expected += static_cast<float>((r * kColumns + c) % 13);
            CHECK(out[r] == expected);
        }
    }
}

template <bool kBarrier>
bool reversed() {
    constexpr int kTiles = 3, kWidth = 64;
    std::vector<float> x(kTiles * kWidth), out(x.size(), NAN);
    std::iota(x.begin(), x.end(), 0.0f);
    probe::launch_reverse<kBarrier>(x.data(), out.data(), kTiles, kWidth, nullptr);
    for (int i = 0; i < kTiles * kWidth; ++i)
        if (out[i] != x[i / kWidth * kWidth + kWidth - 1 - i % kWidth]) return false;
    return true;
}

void compaction() {
    constexpr int kN = 250;
    std::vector<float> x(kN);
    std::vector<int> expected, kept(256, -1);
    for (int i = 0; i < kN; ++i) {
        x[i] = i * 7 % 5 - 2.0f;
        if (x[i] > 0) expected.push_back(i);
    }
    int count = 0;
    SK_LAUNCH(probe::compact_positive, 1, 256, 0, nullptr, x.data(), kN, kept.data(), &count);
    kept.resize(count);
    CHECK(kept == expected);
}

void warp_functions() {
    sk_shim::launch(1, 40, 0, [] {  // a partial second warp
        const int lane = threadIdx.x % 32;
        const unsigned mask = threadIdx.x < 32 ? ~0u : 0xFFu;
        CHECK(__shfl_sync(mask, lane, 3) == 3);
        CHECK(__shfl_sync(mask, lane, 1, 4) == lane / 4 * 4 + 1);
        CHECK(__shfl_up_sync(mask, lane, 1) == (lane ? lane - 1 : 0));
        CHECK(__shfl_down_sync(mask, lane, 1, 8) == (lane % 8 == 7 ? lane : lane + 1));
        CHECK(__shfl_xor_sync(mask, 0.5 * lane, 1) == 0.5 * (lane ^ 1));
        CHECK(__ballot_sync(mask, lane % 2) == (0xAAAAAAAAu & mask));
        CHECK(__any_sync(mask, lane == 7) && !__all_sync(mask, lane == 7));
        CHECK(__reduce_add_sync(mask, 1) == __popc(mask));
        CHECK(__match_any_sync(mask, lane % 2) == ((lane % 2 ? 0xAAAAAAAAu : 0x55555555u) & mask));
        if (lane < 4) CHECK(__reduce_max_sync(0xFu, lane) == 3);  // a subset, while others go on
        CHECK(__syncthreads_count(lane == 0) == 2);
        CHECK(__syncthreads_or(threadIdx.x == 39) && !__syncthreads_and(threadIdx.x == 39));
        if (lane > 2) return;  // those who left count as arrived
        __syncthreads();
    });
}

void scalars() {
    CHECK(float(__nv_bfloat16(1.00390625f)) == 1.0f);  // a tie goes to even
    CHECK(float(__nv_bfloat16(1.01171875f)) == 1.015625f);
    CHECK(std::isnan(float(__nv_bfloat16(NAN))) && std::isinf(float(__nv_bfloat16(3.4e38f))));
    CHECK(float(__half(65504.0f)) == 65504.0f && std::isinf(float(__half(65536.0f))));
    CHECK(__clz(1) == 31 && __clz(0) == 32 && __ffs(8) == 4 && __popcll(~0ull) == 64);
    CHECK(__uint_as_float(__float_as_uint(-1.5f)) == -1.5f);
    unsigned counter = 3;
    CHECK(atomicAdd(&counter, 2) == 3 && atomicCAS(&counter, 5, 9) == 5 && counter == 9);
    CHECK(atomicMax(&counter, 4) == 9 && atomicExch(&counter, 1) == 9 && counter == 1);
}

int main(int argc, char** argv) {
    const std::string what = argc > 1 ? argv[1] : "";
    if (what == "divergent") SK_LAUNCH(probe::divergent_barrier, 1, 64, 0, nullptr);
    if (what == "mask") SK_LAUNCH(probe::half_mask, 1, 32, 0, nullptr);
    if (what == "overflow") {
        std::vector<float> x(31), out(1);
        SK_LAUNCH(probe::read_past_end, 1, 32, 0, nullptr, x.data(), out.data());
    }
    if (!what.empty()) return 0;  // the fault went unnoticed
    sk_shim::for_each_order([] {
        row_sums<float>();
        row_sums<__half>();
        row_sums<__nv_bfloat16>();
        compaction();
        warp_functions();
        CHECK(reversed<true>());
    });
    int wrong = 0;
    sk_shim::for_each_order([&] { wrong += !reversed<false>(); });
    CHECK(wrong > 0);  // a missing barrier shows in some order
    scalars();
    std::puts("ok");
}
