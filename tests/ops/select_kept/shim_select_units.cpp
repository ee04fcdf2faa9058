// Runs csrc/cuda/select_units.cuh on a case from stdin, in three thread orders.
#include "cuda/select_units.cuh"

#include <cstdio>
#include <memory>
#include <vector>

using namespace sk::select_units;

namespace {

template <class T>
std::unique_ptr<T[]> take(size_t n) {
    std::unique_ptr<T[]> items(new T[n]);
    if (n && std::fread(items.get(), sizeof(T), n, stdin) != n) std::abort();
    return items;
}

}  // namespace

int main() {
    const auto head = take<int64_t>(3);  // chunks, segments, prefix
    const int64_t n = head[0];
    const auto cost = take<double>(n);
    const auto segment = take<int64_t>(n);
    const auto free = take<bool>(n);
    const auto left = take<double>(1);
    std::vector<int> ended(head[1]);
    std::vector<std::vector<char>> found;
    sk_shim::for_each_order([&] {
        std::unique_ptr<bool[]> chosen(new bool[n]);
        launch(Fill{cost.get(), segment.get(), free.get(), left.get(), chosen.get(), ended.data(),
                    n, (int)head[1], head[2] != 0},
               nullptr);
        found.emplace_back(chosen.get(), chosen.get() + n);
    });
    for (const auto& other : found)
        if (other != found[0]) std::abort();
    for (const char kept : found[0]) std::printf("%d ", kept);
}
