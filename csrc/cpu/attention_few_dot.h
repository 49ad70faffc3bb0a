// Attention of few query rows by bfloat16 products of vectors: the two products of `attend_few`. Included by attention_few_bf16.h only,
// for the level avx512_bf16.
//
// A row's sums run over pairs of keys in order, whatever rows share a tile with it, and of a pair that it sees half of, the other half
// is zero.
#pragma once
#include "attention_few.h"

namespace gemcutter {
namespace {

constexpr int64_t BLOCK_KEYS = 16;  // scored in one go with more than one tile of query vectors
constexpr int64_t KEYS_AHEAD = 8;   // prefetched: the hardware prefetcher stops at the end of every row
// Of values that are summed in registers before the output is updated: part of an L1 cache; and pairs of such a block.
constexpr int64_t VALUE_BYTES = 16384, MOST_PAIRS = 16;

// Lane i is the sum of vector i; every sum is taken in the same order.
inline V sum_each(const V (&x)[16]) {
    V fours[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        V twos[2];
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            const V a = x[4 * i + 2 * j], b = x[4 * i + 2 * j + 1];
            twos[j] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                      __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
        }
        fours[i] = __builtin_shufflevector(twos[0], twos[1], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                   __builtin_shufflevector(twos[0], twos[1], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
    V halves[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const V a = fours[2 * i], b = fours[2 * i + 1];
        halves[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                    __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    return __builtin_shufflevector(halves[0], halves[1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           __builtin_shufflevector(halves[0], halves[1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

// Scores of H query vectors with 16 / H keys: scores[(pair * stride + vector) * 2 + half].
template <int H, typename Element>
inline void score_few(const uint16_t *q, int64_t dim, const Element *const *rows, float *scores, int64_t stride) {
    constexpr int T = 16 / H;
    V acc[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) acc[i] = set1(0.0f);
    for (int64_t e = 0; e < dim; e += COLUMNS) {
        __m512i k[T];
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) k[t] = load_bf16_codes(rows[t] + e);
#pragma GCC unroll 8
        for (int h = 0; h < H; ++h) {
            const __m512i x = _mm512_loadu_si512(q + h * dim + e);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                V &total = acc[(t / 2 * H + h) * 2 + t % 2];
                total = dot_pairs(total, k[t], x);
            }
        }
    }
    float each[16];
    store(each, sum_each(acc));
#pragma GCC unroll 4
    for (int p = 0; p < T / 2; ++p) memcpy(scores + p * stride * 2, each + p * 2 * H, sizeof(float) * 2 * H);
}

template <typename Element>
void prefetch_row(const Element *row, int64_t dim) {
    for (int64_t e = 0; e < dim; e += (int64_t)(64 / sizeof(Element))) __builtin_prefetch(row + e);
}

// Scores of all pairs. What a tile has beyond the keys that rows see repeats the nearest of them.
template <int H, typename Element>
void score_pairs(const FewRows &few, const Keys &keys) {
    constexpr int64_t T = 16 / H;
    const int64_t block = few.vectors > H ? BLOCK_KEYS : T, end = 2 * (few.first_pair + few.pairs);
    const int64_t ahead = block > KEYS_AHEAD ? block : KEYS_AHEAD;
    for (int64_t t = 2 * few.first_pair; t < end; t += block) {
        const Element *rows[BLOCK_KEYS];
        const int64_t count = end - t < block ? end - t : block;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t later = t + i + ahead, value = few.first + later - few.last;
            rows[i] = elements_of<Element>(keys.k, keys, nearest_seen(few, t + i));
            if (later < few.last) prefetch_row(elements_of<Element>(keys.k, keys, later), few.dim);
            else if (value < few.last) prefetch_row(elements_of<Element>(keys.v, keys, value), few.dim);
        }
        float *to = few.scores + (t / 2 - few.first_pair) * few.vectors * 2;
        for (int64_t v = 0; v < few.vectors; v += H)
            for (int64_t i = 0; i < count; i += T)
                score_few<H>(few.q + v * few.dim, few.dim, rows + i, to + (i / 2 * few.vectors + v) * 2, few.vectors);
    }
}

template <typename Element>
void score_all(const FewRows &few, const Keys &keys) {
    auto *score = few.vectors >= 8   ? score_pairs<8, Element>
                  : few.vectors == 4 ? score_pairs<4, Element>
                                     : score_pairs<2, Element>;
    score(few, keys);
}

// sums [H, 32 columns from e on] += the values of `pairs` pairs of keys by their weights.
template <int H, typename Element>
inline void value_few(const uint32_t *weights, int64_t stride, const Element *const *rows, int64_t pairs, int64_t e, float *sums,
                      int64_t dim) {
    V acc[H][2];
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h) acc[h][0] = load(sums + h * dim + e), acc[h][1] = load(sums + h * dim + e + W);
    for (int64_t i = 0; i < pairs; ++i) {
        const Halves even = (Halves)load_bf16_codes(rows[2 * i] + e), odd = (Halves)load_bf16_codes(rows[2 * i + 1] + e);
        const Halves near = near_columns(even, odd), far = far_columns(even, odd);
#pragma GCC unroll 8
        for (int h = 0; h < H; ++h) {
            __m512i x = _mm512_set1_epi32((int)weights[i * stride + h]);
            in_register(x);
            acc[h][0] = dot_pairs(acc[h][0], (__m512i)near, x);
            acc[h][1] = dot_pairs(acc[h][1], (__m512i)far, x);
        }
    }
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h) store(sums + h * dim + e, acc[h][0]), store(sums + h * dim + e + W, acc[h][1]);
}

// Values of H query vectors; meanwhile prefetches the rows of `next`, if it is given.
template <int H, typename Element>
void value_columns(const uint32_t *weights, int64_t stride, const Element *const *rows, int64_t pairs, const Element *const *next,
                   float *sums, int64_t dim) {
    int64_t prefetched = 0;
    for (int64_t e = 0; e < dim; e += COLUMNS) {
        for (; next && prefetched < 2 * pairs && prefetched * dim <= e * 2 * pairs; ++prefetched)
            prefetch_row(next[prefetched], dim);
        value_few<H>(weights, stride, rows, pairs, e, sums, dim);
    }
}

template <typename Element>
void value_vectors(const FewRows &few, int64_t vector, int64_t end, int64_t pair, const Element *const *rows, int64_t pairs,
                   const Element *const *next) {
    const uint32_t *weights = few.weights + (pair - few.first_pair) * few.vectors;
    while (vector < end) {
        const int64_t left = end - vector, count = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        auto *run = count == 8   ? value_columns<8, Element>
                    : count == 4 ? value_columns<4, Element>
                    : count == 2 ? value_columns<2, Element>
                                 : value_columns<1, Element>;
        run(weights + vector, few.vectors, rows, pairs, next, few.sums + vector * few.dim, few.dim);
        vector += count, next = nullptr;
    }
}

// The half of a pair that a row sees; what it does not see may hold anything.
template <typename Element>
void value_half(const FewRows &few, const Keys &keys, int64_t row, int64_t position) {
    const auto *zeros = reinterpret_cast<const Element *>(few.zeros), *seen = elements_of<Element>(keys.v, keys, position);
    const Element *rows[2] = {position % 2 ? zeros : seen, position % 2 ? seen : zeros};
    value_vectors<Element>(few, row * few.heads, (row + 1) * few.heads, position / 2, rows, 1, nullptr);
}

// Values of the pairs that rows see whole; the rows lo..hi-1 see the same of them.
template <typename Element>
void value_pairs(const FewRows &few, const Keys &keys, const DecodeRow *queries, int64_t num) {
    const int64_t most = VALUE_BYTES / (few.dim * (int64_t)sizeof(Element) * 2);
    const int64_t block = most < 1 ? 1 : most < MOST_PAIRS ? most : MOST_PAIRS, end = queries[num - 1].last / 2;
    const auto begin_of = [&](int64_t row) { return (queries[row].first + 1) / 2; };
    const auto end_of = [&](int64_t row) { return queries[row].last / 2; };
    int64_t lo = 0, hi = 0;
    for (int64_t p = begin_of(0); p < end;) {
        while (lo < num && end_of(lo) <= p) ++lo;
        while (hi < num && begin_of(hi) <= p) ++hi;
        if (lo >= hi) {
            p = begin_of(lo);
            continue;
        }
        const int64_t until = hi < num && begin_of(hi) < end_of(lo) ? begin_of(hi) : end_of(lo);
        const int64_t count = until - p < block ? until - p : block;
        const Element *rows[2 * MOST_PAIRS], *next[2 * MOST_PAIRS];
        for (int64_t i = 0; i < 2 * count; ++i) {
            const int64_t later = 2 * (p + count) + i;
            rows[i] = elements_of<Element>(keys.v, keys, 2 * p + i);
            next[i] = elements_of<Element>(keys.v, keys, later < few.last ? later : few.last - 1);
        }
        value_vectors<Element>(few, lo * few.heads, hi * few.heads, p, rows, count, next);
        p += count;
    }
}

template <typename Element>
void value_all(const FewRows &few, const Keys &keys, const DecodeRow *rows, int64_t count) {
    for (int64_t m = 0; m < count; ++m)
        if (rows[m].first % 2) value_half<Element>(few, keys, m, rows[m].first);
    value_pairs<Element>(few, keys, rows, count);
    for (int64_t m = 0; m < count; ++m)
        if (rows[m].last % 2 && rows[m].last > rows[m].first + rows[m].first % 2)
            value_half<Element>(few, keys, m, rows[m].last - 1);
}

}  // namespace
}  // namespace gemcutter
