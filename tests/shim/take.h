// Reads what a test writes to a shim program.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <vector>

template <class T>
std::vector<T> take(size_t n) {
    std::vector<T> items(n);
    if (n && std::fread(items.data(), sizeof(T), n, stdin) != n) std::abort();
    return items;
}
