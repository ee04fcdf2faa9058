// Exactly the k best of many entries, as packed bits, in one streaming pass.
//
// A sample brackets the threshold. The pass sets the bits above the bracket and lists the few
// entries inside it; those are then ranked. If the bracket misses (or ties overflow the lists) the
// keys are counted digit by digit instead, in four more passes. Both give the same, exact answer.
#include "checks.h"
#include "cpu/ranges.h"
#include "cpu/select_scan.h"
#include "select_checks.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

namespace {

using sk::ScalarType;
using sk::Tensor;

constexpr int64_t kPiece = 1 << 15;  // entries a thread takes at a time
constexpr int64_t kSamples = 1 << 16;
constexpr int64_t kSmall = 1 << 14;  // fewer entries are counted at once, without a sample
constexpr double kSigmas = 3.5;      // half the bracket, in standard deviations of a sample

struct Selection {
    const std::vector<Piece>& pieces;
    int64_t n, k, score;
    int threads;
    std::vector<int64_t> kept_per_piece;
    float threshold = std::numeric_limits<float>::infinity();

    // body(thread, piece): each thread takes the next piece until there is none.
    template <class Body>
    void each_piece(const Body& body) const {
        sk::for_each_in_ranges((int64_t)pieces.size(), threads,
                               [&](int64_t t, int64_t i) { body((int)t, i); });
    }

    Bracket bracket() const;
    bool by_sample();
    void by_counting();
};

uint64_t mix(uint64_t x) {
    x = (x ^ x >> 31) * 0x7fb5d329728ea185ull;
    x = (x ^ x >> 27) * 0x81dadef4bc2dd44dull;
    return x ^ x >> 33;
}

// Scores around the k-th, from one entry at a fixed random place in each of m equal stretches.
Bracket Selection::bracket() const {
    const int64_t m = std::min(kSamples, n / 16);
    std::vector<float> sample(m);
    constexpr int64_t kAhead = 64;  // a thread waits for memory once for so many entries
    torch::stable::parallel_for(0, m, m / threads + 1, [&](int64_t begin, int64_t end) {
        Scratch scratch;
        const Piece* piece[kAhead];
        int64_t place[kAhead], base = 0;
        size_t p = 0;
        for (int64_t first = begin; first < end; first += kAhead) {
            const int64_t count = std::min(kAhead, end - first);
            for (int64_t i = 0; i < count; ++i) {
                const double within = (double)(mix(first + i + 1) >> 11) * 0x1p-53;
                const double share = ((double)(first + i) + within) / (double)m;
                const int64_t at = std::min(n - 1, (int64_t)(share * (double)n));
                while (at >= base + pieces[p].n) base += pieces[p++].n;
                piece[i] = &pieces[p];
                place[i] = pieces[p].first + at - base;
                const Source& s = *pieces[p].source;
                __builtin_prefetch((const char*)s.value + place[i] * bytes_of(s.value_type));
                __builtin_prefetch((const char*)s.grad + place[i] * bytes_of(s.grad_type));
            }
            for (int64_t i = 0; i < count; ++i) {
                const float x = *score_tile(*piece[i]->source, score, place[i], 1, scratch);
                sample[first + i] = x == x ? x : -std::numeric_limits<float>::infinity();
            }
        }
    });
    const double share = (double)k / (double)n;
    const double half = kSigmas * std::sqrt((double)m * share * (1 - share)) + kSigmas;
    const int64_t from = (int64_t)(share * (double)m - half),
                  to = (int64_t)(share * (double)m + half);
    Bracket b{-std::numeric_limits<float>::infinity(), std::numeric_limits<float>::infinity()};
    // The second rank is sought on the shorter side of the first.
    auto begin = sample.begin(), end = sample.end();
    const auto find = [&](int64_t rank, float& bound) {
        if (rank <= 0 || rank >= m) return;
        std::nth_element(begin, sample.begin() + rank, end, std::greater<float>());
        bound = sample[rank];
        (2 * from < m ? end : begin) = sample.begin() + rank;
    };
    if (2 * from < m) {
        find(to, b.low);
        find(from, b.high);
    } else {
        find(from, b.high);
        find(to, b.low);
    }
    return b;
}

bool Selection::by_sample() {
    if (n < kSmall || k == 0 || k == n) return false;
    const Bracket b = bracket();
    if (!(b.low < b.high)) return false;
    const ScanFn scan_one = best_scan();
    const int64_t most = n / 8;
    // Kept from call to call: touching new pages takes longer than filling them.
    static thread_local std::vector<Inside> of_this_thread;
    std::vector<Inside>& inside = of_this_thread;
    inside.resize(std::max<size_t>(inside.size(), threads));
    for (Inside& list : inside) list.reserve(most + kPiece + 16);
    std::vector<Found> found(pieces.size());
    std::atomic<int64_t> total{0};
    each_piece([&](int t, int64_t i) {
        if (total.load(std::memory_order_relaxed) > most) return;
        found[i].thread = t;
        scan_one(pieces[i], score, b, inside[t], found[i]);
        total.fetch_add(found[i].count, std::memory_order_relaxed);
    });
    if (total.load() > most) {
        inside.clear();
        return false;
    }
    int64_t above = 0;
    for (const Found& f : found) above += f.above;
    int64_t need = k - above;
    if (need < 1 || need > total.load()) return false;

    // The need-th key inside: count 4096 stretches of the bracket, then rank one of them.
    const uint32_t floor_key = key_of(b.low);
    const uint32_t span = key_of(b.high) - floor_key;
    const int shift = std::max(0, 32 - __builtin_clz(span | 1) - 12);
    std::vector<std::array<int32_t, 4096>> counts(threads);
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            counts[t].fill(0);
            for (int64_t i = 0; i < inside[t].size; ++i) {
                uint32_t& bits = inside[t].bits[i];
                float x;
                std::memcpy(&x, &bits, 4);
                bits = key_of(x);
                ++counts[t][(bits - floor_key) >> shift];
            }
        }
    });
    int bin = 4095;
    for (;; --bin) {
        int64_t here = 0;
        for (const auto& c : counts) here += c[bin];
        if (here >= need) break;
        need -= here;
    }
    std::vector<uint32_t> keys;
    for (const Inside& list : inside)
        for (int64_t i = 0; i < list.size; ++i)
            if ((int)((list.bits[i] - floor_key) >> shift) == bin) keys.push_back(list.bits[i]);
    std::nth_element(keys.begin(), keys.begin() + (need - 1), keys.end(), std::greater<uint32_t>());
    const uint32_t last = keys[need - 1];
    for (const uint32_t key : keys) need -= key > last;

    const auto set = [&](int64_t i, uint32_t at) {
        const int64_t entry = pieces[i].first + at;
        pieces[i].source->bits[entry / 8] |= (uint8_t)(1u << entry % 8);
    };
    each_piece([&](int, int64_t i) {
        Found& f = found[i];
        const Inside& list = inside[f.thread];
        uint8_t* bits = pieces[i].source->bits + pieces[i].first / 8;
        int64_t kept = f.above;
        for (int64_t c = f.begin; c < f.begin + f.count; ++c) {  // no branch: half are kept
            const uint32_t at = list.at[c], keep = list.bits[c] > last;
            bits[at / 8] |= (uint8_t)(keep << at % 8);
            kept += keep;
            f.ties += list.bits[c] == last;
        }
        kept_per_piece[i] = kept;
    });
    for (size_t i = 0; i < found.size() && need; ++i) {
        if (!found[i].ties) continue;
        const Inside& list = inside[found[i].thread];
        for (int64_t c = found[i].begin; c < found[i].begin + found[i].count && need; ++c)
            if (list.bits[c] == last) set(i, list.at[c]), --need, ++kept_per_piece[i];
    }
    threshold = score_of(last);
    return true;
}

// Radix selection: three counting passes over the keys, one for the ties, one for the bits.
void Selection::by_counting() {
    const auto each_key = [&](int64_t i, const auto& body) {
        const Piece& p = pieces[i];
        Scratch scratch;
        for (int64_t j = 0; j < p.n; j += kTile) {
            const int64_t count = std::min(kTile, p.n - j);
            const float* s = score_tile(*p.source, score, p.first + j, count, scratch);
            for (int64_t q = 0; q < count; ++q) body(j + q, key_of(s[q]));
        }
    };
    uint32_t last = 0;
    int64_t need = k;
    if (k > 0) {
        int done = 0;
        for (const int digits : {11, 11, 10}) {
            const int shift = 32 - done - digits;
            std::vector<std::array<int64_t, 2048>> counts(threads);
            for (auto& c : counts) c.fill(0);
            each_piece([&](int t, int64_t i) {
                each_key(i, [&](int64_t, uint32_t key) {
                    if (done && key >> (32 - done) != last >> (32 - done)) return;
                    ++counts[t][key >> shift & ((1u << digits) - 1)];
                });
            });
            int64_t bin = (1 << digits) - 1;
            for (;; --bin) {
                int64_t here = 0;
                for (const auto& c : counts) here += c[bin];
                if (here >= need) break;
                need -= here;
            }
            last |= (uint32_t)bin << shift;
            done += digits;
        }
        threshold = score_of(last);
    }
    std::vector<int64_t> ties(pieces.size() + 1, 0);
    each_piece([&](int, int64_t i) {
        int64_t here = 0;
        each_key(i, [&](int64_t, uint32_t key) { here += key == last; });
        ties[i + 1] = here;
    });
    for (size_t i = 0; i < pieces.size(); ++i) ties[i + 1] += ties[i];
    each_piece([&](int, int64_t i) {
        const Piece& p = pieces[i];
        std::memset(p.source->bits + p.first / 8, 0, (p.n + 7) / 8);
        int64_t left = need - ties[i], kept = 0;
        each_key(i, [&](int64_t at, uint32_t key) {
            const bool keep = k > 0 && (key > last || (key == last && left-- > 0));
            kept += keep;
            p.source->bits[(p.first + at) / 8] |= (uint8_t)(keep << at % 8);
        });
        kept_per_piece[i] = kept;
    });
}

float select(const std::vector<Source>& sources, size_t begin, size_t end, int64_t k, int64_t score,
             int64_t* counts) {
    std::vector<Piece> pieces;
    int64_t n = 0;
    for (size_t s = begin; s < end; ++s) {
        for (int64_t first = 0; first < sources[s].numel; first += kPiece)
            pieces.push_back({&sources[s], first, std::min(kPiece, sources[s].numel - first)});
        n += sources[s].numel;
        counts[s] = 0;
    }
    STD_TORCH_CHECK(0 <= k && k <= n, "k: expected an integer in [0, ", n, "], got ", k);
    if (n == 0) return std::numeric_limits<float>::infinity();
    const int threads = (int)std::min<int64_t>(torch::stable::get_num_threads(), pieces.size());
    Selection selection{pieces, n, k, score, threads, std::vector<int64_t>(pieces.size(), 0)};
    if (!selection.by_sample()) selection.by_counting();
    for (size_t i = 0; i < pieces.size(); ++i)
        counts[pieces[i].source - sources.data()] += selection.kept_per_piece[i];
    return selection.threshold;
}

void select_elements(std::vector<Tensor> tensors, std::vector<Tensor> grads,
                     std::vector<int64_t> offsets, std::vector<int64_t> k, int64_t score,
                     Tensor arena, Tensor threshold, Tensor counts) {
    sk::check_select(tensors.size(), grads.size(), offsets.size(), k.size(), score, kScores, arena,
                     threshold, counts, sk::check_cpu);
    uint8_t* bits = static_cast<uint8_t*>(arena.data_ptr());
    std::vector<Source> sources;
    for (size_t i = 0; i < tensors.size(); ++i) {
        sk::check_cpu(tensors[i], "tensors");
        sk::check_cpu(grads[i], "grads");
        sk::check_contiguous(tensors[i], "tensors");
        sk::check_contiguous(grads[i], "grads");
        const int64_t n = tensors[i].numel();
        sk::check_numel(grads[i], "grads", n);
        // From one place on to the next, so that all lie in the arena once the last does.
        const int64_t before = i ? offsets[i - 1] : 0;
        sk::check_count(offsets[i], "offsets", before, arena.numel() - (n + 7) / 8);
        sources.push_back({tensors[i].data_ptr(), grads[i].data_ptr(), sk::type_code(tensors[i]),
                           sk::type_code(grads[i]), n, bits + offsets[i]});
    }
    prefer_huge_pages(bits, arena.numel());
    for (size_t i = 0; i < sources.size(); ++i) {
        const int64_t used = offsets[i] + (sources[i].numel + 7) / 8;
        const int64_t next = i + 1 < sources.size() ? offsets[i + 1] : arena.numel();
        if (next > used) std::memset(bits + used, 0, next - used);
    }
    float* lowest = static_cast<float*>(threshold.data_ptr());
    int64_t* kept = static_cast<int64_t*>(counts.data_ptr());
    if (k.size() == 1)
        lowest[0] = select(sources, 0, sources.size(), k[0], score, kept);
    else
        for (size_t i = 0; i < k.size(); ++i)
            lowest[i] = select(sources, i, i + 1, k[i], score, kept);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sensikernels_native, m) {
    m.def(
        "select_elements(Tensor[] tensors, Tensor[] grads, int[] offsets, int[] k, int score, "
        "Tensor(a!) arena, Tensor(b!) threshold, Tensor(c!) counts) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CPU, m) {
    m.impl("select_elements", TORCH_BOX(&select_elements));
}
