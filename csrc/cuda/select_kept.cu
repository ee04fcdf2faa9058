// Binds select_kept.cuh to torch.
#include "stream.h"
//
#include "cuda/select_kept.cuh"
#include "select_checks.h"

#include <vector>

namespace sk::select_kept {
namespace {

void select_elements(std::vector<Tensor> tensors, std::vector<Tensor> grads,
                     std::vector<int64_t> offsets, std::vector<int64_t> k, int64_t score,
                     Tensor arena, Tensor threshold, Tensor counts) {
    check_select(tensors.size(), grads.size(), offsets.size(), k.size(), score, kScores, arena,
                 threshold, counts, check_cuda);
    if (tensors.empty()) return;
    const int device = arena.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    arena = torch::stable::fill_(arena, 0);
    uint8_t* bits = static_cast<uint8_t*>(arena.mutable_data_ptr());

    std::vector<Sources> batches;
    int64_t entries = 0;
    for (size_t i = 0; i < tensors.size(); ++i) {
        for (const Tensor* t : {&tensors[i], &grads[i]}) {
            check_cuda(*t, "tensors");
            check_contiguous(*t, "tensors");
        }
        const int64_t n = tensors[i].numel(), bytes = (n + 7) / 8;
        check_numel(grads[i], "grads", n);
        check_count(offsets[i], "offsets", 0, arena.numel() - bytes);
        STD_TORCH_CHECK(offsets[i] % 8 == 0, "offsets: expected whole words, got ", offsets[i]);
        if (i % kSources == 0) batches.push_back(Sources{{}, 0, (int)score, 0});
        Sources& batch = batches.back();
        Source& s = batch.at[batch.count++];
        s.value = reinterpret_cast<int64_t>(tensors[i].const_data_ptr());
        s.grad = reinterpret_cast<int64_t>(grads[i].const_data_ptr());
        s.value_type = (int16_t)type_code(tensors[i]);
        s.grad_type = (int16_t)type_code(grads[i]);
        s.numel = tensors[i].numel();
        s.entry0 = entries;
        s.piece0 = batch.pieces;
        s.selection = k.size() == 1 ? 0 : (int32_t)i;
        s.k = k[s.selection];
        s.bits = bits + offsets[i];
        batch.pieces += (s.numel + kPiece - 1) / kPiece;
        entries += s.numel;
    }
    STD_TORCH_CHECK(entries <= kMostEntries, "tensors: expected at most 2**33 entries, got ",
                    entries);
    const int64_t selections = (int64_t)k.size(), capacity = entries / 16 + 1024;
    const auto bytes = [&](int64_t n) { return torch::stable::new_empty(arena, {n}); };
    Tensor states = bytes(selections * (int64_t)sizeof(State));
    Tensor histograms = bytes(selections * kBins * 8), listed = bytes(8);
    Tensor list = bytes(capacity * (int64_t)sizeof(Candidate));
    const Buffers buffers{static_cast<State*>(states.mutable_data_ptr()),
                          static_cast<unsigned long long*>(histograms.mutable_data_ptr()),
                          static_cast<unsigned long long*>(listed.mutable_data_ptr()),
                          static_cast<Candidate*>(list.mutable_data_ptr()),
                          capacity,
                          static_cast<unsigned long long*>(counts.mutable_data_ptr()),
                          static_cast<float*>(threshold.mutable_data_ptr()),
                          (int)selections,
                          0};
    int processors = 0;
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    launch(batches.data(), (int)batches.size(), buffers, 4 * processors, current_stream(arena));
    check_launch("select_elements");
}

}  // namespace
}  // namespace sk::select_kept

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CUDA, m) {
    m.impl("select_elements", TORCH_BOX(&sk::select_kept::select_elements));
}
