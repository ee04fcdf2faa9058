// Runs csrc/cuda/select_kept.cuh on a case from stdin; prints thresholds, counts and bytes.
#include "cuda/select_kept.cuh"
#include "shim/take.h"

#include <cstdio>
#include <memory>
#include <vector>

using namespace sk::select_kept;

namespace {}  // namespace

int main() {
    // tensors, score, per tensor, resident blocks, capacity, entries per batch of sources
    const auto head = take<int64_t>(6);
    const int64_t n = head[0], selections = head[2] ? n : 1;
    const auto facts = take<int64_t>(6 * n);  // numel, value type, grad type, bytes, bytes, k
    std::vector<std::unique_ptr<char[]>> storage;
    std::vector<std::vector<unsigned>> bits;
    auto batches = std::make_unique<std::vector<Sources>>();
    int64_t entries = 0;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t* f = facts.data() + 6 * i;
        if (i % head[5] == 0) batches->push_back(Sources{{}, 0, (int)head[1], 0});
        Sources& batch = batches->back();
        Source& s = batch.at[batch.count++];
        for (const int which : {3, 4}) {
            const auto bytes = take<char>(f[which]);
            storage.emplace_back(new char[bytes.size()]);
            std::copy(bytes.begin(), bytes.end(), storage.back().get());
            (which == 3 ? s.value : s.grad) = reinterpret_cast<int64_t>(storage.back().get());
        }
        bits.emplace_back((f[0] + 31) / 32 + 1, 0u);
        s.numel = f[0];
        s.value_type = (int16_t)f[1];
        s.grad_type = (int16_t)f[2];
        s.k = f[5];
        s.selection = head[2] ? (int32_t)i : 0;
        s.entry0 = entries;
        s.piece0 = batch.pieces;
        s.bits = reinterpret_cast<uint8_t*>(bits.back().data());
        entries += f[0];
        batch.pieces += (f[0] + kPiece - 1) / kPiece;
    }
    std::vector<State> states(selections);
    std::vector<unsigned long long> histograms(selections * kBins, ~0ull), listed(1, ~0ull);
    std::vector<unsigned long long> counts(n, ~0ull);
    std::vector<Candidate> list(head[4]);
    std::vector<float> thresholds(selections, NAN);
    launch(batches->data(), (int)batches->size(),
           Buffers{states.data(), histograms.data(), listed.data(), list.data(), head[4],
                   counts.data(), thresholds.data(), (int)selections, 0},
           (int)head[3], nullptr);
    for (const float t : thresholds) std::printf("%08x ", __float_as_uint(t));
    std::printf("\n");
    for (const auto c : counts) std::printf("%llu ", c);
    std::printf("\n");
    for (int64_t i = 0; i < n; ++i)
        for (int64_t b = 0; b < (facts[6 * i] + 7) / 8; ++b)
            std::printf("%d ", reinterpret_cast<uint8_t*>(bits[i].data())[b]);
    std::printf("\n");
}
