// Runs csrc/cuda/group_reduce.cuh on a case from stdin; prints the bits of out, running and ema.
#include "cuda/group_reduce.cuh"
#include "shim/take.h"

#include <cstdio>
#include <memory>
#include <vector>

using namespace sk::group_reduce;

namespace {

void print(const std::vector<float>& values) {
    for (const float v : values) std::printf("%08x ", __float_as_uint(v));
    std::printf("\n");
}

}  // namespace

int main() {
    const auto head = take<int64_t>(8);
    const auto decay = take<float>(1);
    auto tensors = take<Descriptor>(head[0]);
    const auto sizes = take<int64_t>(2 * head[0]);
    const auto chunks = take<Chunk>(head[1]);
    const auto starts = take<int64_t>(head[2] + 1);
    const auto order = take<int32_t>(head[3]);
    const auto members = take<int64_t>(head[4]);
    const unsigned mask = (unsigned)head[6];
    const int64_t groups = head[2], partials = head[5], resident = head[7];
    const size_t slots = __builtin_popcount(mask);
    // Each tensor in memory of its own, exactly as large as it is: the sanitizer sees a step past
    // it.
    std::vector<std::unique_ptr<char[]>> storage;
    for (int64_t i = 0; i < 2 * head[0]; ++i) {
        const auto bytes = take<char>(sizes[i]);
        int64_t& address = i % 2 ? tensors[i / 2].grad : tensors[i / 2].weight;
        storage.emplace_back(new char[bytes.size()]);
        std::copy(bytes.begin(), bytes.end(), storage.back().get());
        address = reinterpret_cast<int64_t>(storage.back().get()) + address;
    }
    const auto first = take<float>(slots * groups);
    std::vector<float> expected;
    sk_shim::for_each_order([&] {
        std::vector<float> scratch(slots * partials, NAN), out(slots * groups, NAN);
        auto running = first, ema = first;
        launch(Work{tensors.data(), chunks.data(), members.data(), scratch.data(),
                    (int64_t)chunks.size(), partials, mask},
               Finish{starts.data(), order.empty() ? nullptr : order.data(), scratch.data(),
                      out.data(), running.data(), ema.data(), partials, groups, mask, decay[0]},
               (int)resident, nullptr);
        std::vector<float> all = out;
        all.insert(all.end(), running.begin(), running.end());
        all.insert(all.end(), ema.begin(), ema.end());
        if (expected.empty()) expected = all;
        if (!all.empty() && std::memcmp(all.data(), expected.data(), 4 * all.size())) std::abort();
    });
    print(expected);
}
