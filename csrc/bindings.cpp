// Owns the `sensikernels_native` namespace. Each kernel file adds its own raw launchers to it with
// STABLE_TORCH_LIBRARY_FRAGMENT; the public schemas are Python's (namespace `sensikernels`).
#include <torch/csrc/stable/library.h>

#include <string>

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

std::string build_info() {
    return std::string("{\"torch\": \"" SK_TORCH_BUILD "\", \"stable_abi\": \"2.10\"") +
           ", \"compiler\": \"" + kCompiler + "\", \"cuda_archs\": \"" SK_CUDA_ARCHS "\"}";
}

}  // namespace

STABLE_TORCH_LIBRARY(sensikernels_native, m) {
    m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CompositeExplicitAutograd, m) {
    m.impl("build_info", TORCH_BOX(&build_info));
}
