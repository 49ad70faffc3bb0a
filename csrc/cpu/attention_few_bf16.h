// Attention of few query rows over a cache of bfloat16 or int8 by bfloat16 products: `attend_few`. Included by attention_bf16.cpp only.
//
// Owns the layout: a score vector has one lane for each query vector and each of two neighbouring keys, so that softmax needs no
// sums across lanes and its weights, rounded to bfloat16, are the pairs that values are multiplied with. A row's result depends on
// itself alone: its sums run over pairs of keys in order, whatever rows share a tile with it, and of a pair that it sees half of,
// the other half is zero. Codes of int8 are exact in bfloat16; their scales are multiplied into scores and, before they are rounded,
// into weights. Refuses to know sequences, pages and threads. Shape letters: V query vectors (rows times heads, rounded up to whole
// tiles), E head dim, P pairs of keys.
#pragma once
#include <math.h>

#include "attention_rows.h"
#include "matmul_f32.h"
#include "softmax_bf16.h"

namespace gemcutter {
namespace {

constexpr int64_t COLUMNS = 2 * W;  // of one vector of bfloat16
constexpr int64_t BLOCK_KEYS = 16;  // scored in one go with more than one tile of query vectors
constexpr int64_t KEYS_AHEAD = 8;   // prefetched: the hardware prefetcher stops at the end of every row
constexpr int64_t VALUE_BYTES =
    16384;                          // of values that are summed in registers before the output is updated: part of an L1 cache
constexpr int64_t MOST_PAIRS = 16;  // of such a block

inline int64_t vectors_of(int64_t queries) { return queries > 4 ? padded_to(queries, 8) : queries > 2 ? 4 : 2; }

struct FewRows {
    int64_t heads, dim, queries, vectors;  // `queries` of V exist
    int64_t first, last;                   // positions that some row sees
    int64_t first_pair, pairs;             // of the scores: whole tiles, with keys that nobody sees at either end
    uint16_t *q;                           // [V, E]
    float *scores;                         // [P, V, 2]
    uint32_t *weights;                     // [P, V], two bfloat16 each
    float *sums;                           // [queries, E], the columns of each 32 as `value_tile` leaves them
    uint16_t *zeros;                       // [E]
};

// 32 elements as bfloat16.
inline __m512i load_bf16_codes(const uint16_t *p) { return _mm512_loadu_si512(p); }
inline __m512i load_bf16_codes(const int8_t *p) { return (__m512i)_mm512_cvtne2ps_pbh(S8::vector(p + W), S8::vector(p)); }

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
            const int64_t at = t + i < few.first ? few.first : t + i < few.last ? t + i : few.last - 1;
            const int64_t later = t + i + ahead, value = few.first + later - few.last;
            rows[i] = elements_of<Element>(keys.k, keys, at);
            if (later < few.last) prefetch_row(elements_of<Element>(keys.k, keys, later), few.dim);
            else if (value < few.last) prefetch_row(elements_of<Element>(keys.v, keys, value), few.dim);
        }
        float *to = few.scores + (t / 2 - few.first_pair) * few.vectors * 2;
        for (int64_t v = 0; v < few.vectors; v += H)
            for (int64_t i = 0; i < count; i += T)
                score_few<H>(few.q + v * few.dim, few.dim, rows + i, to + (i / 2 * few.vectors + v) * 2, few.vectors);
    }
}

// scores *= the scale of their key; 1 for keys that nobody sees.
inline void scale_pairs(const FewRows &few, const Keys &keys, const float *scales) {
    for (int64_t p = 0; p < few.pairs; ++p) {
        float by[2];
        for (int64_t half = 0; half < 2; ++half) {
            const int64_t t = 2 * (few.first_pair + p) + half;
            by[half] = t < few.first || t >= few.last ? 1.0f : scales[slot_of(keys, t) * keys.scale_stride];
        }
        float *row = few.scores + p * few.vectors * 2;
        for (int64_t i = 0; i < 2 * few.vectors; ++i) row[i] *= by[i % 2];
    }
}

inline void hide_keys(const FewRows &few, int64_t row, int64_t first, int64_t last) {
    float *own = few.scores + row * few.heads * 2;
    for (int64_t t = first; t < last; ++t)
        for (int64_t h = 0; h < few.heads; ++h) own[((t / 2 - few.first_pair) * few.vectors + h) * 2 + t % 2] = -INFINITY;
}

// top [V] = the largest score.
inline void largest_scores(const FewRows &few, float *top) {
    const int64_t stride = few.vectors * 2, size = few.pairs * stride, step = stride < W ? W : stride;
    for (int64_t column = 0; column < stride; column += W) {
        V best = load(few.scores + column);
        for (int64_t i = column + step; i < size; i += step) best = vmax(best, load(few.scores + i));
        float lanes[W];
        store(lanes, best);
        for (int64_t width = W; width > stride; width /= 2)
            for (int64_t i = 0; i < width / 2; ++i) lanes[i] = lanes[i] > lanes[i + width / 2] ? lanes[i] : lanes[i + width / 2];
        for (int64_t i = 0; i < (stride < W ? stride : W); i += 2)
            top[(column + i) / 2] = lanes[i] > lanes[i + 1] ? lanes[i] : lanes[i + 1];
    }
}

// Turns scores into weights relative to top [V]; total [V] = the sums of the weights before they are scaled and rounded, each
// taken pair by pair whatever the number of query vectors.
inline void weigh_pairs(const FewRows &few, const float *top, float *total) {
    const int64_t stride = few.vectors * 2, size = few.pairs * stride, period = stride < W ? stride : W;
    float shifts[W], sums[W];
    for (int64_t column = 0; column < stride; column += W) {
        for (int64_t i = 0; i < W; ++i) shifts[i] = top[(column + i % period) / 2], sums[i] = 0;
        const V shift = load(shifts);
        for (int64_t i = column; i < size; i += stride < W ? W : stride) store(few.scores + i, exp(load(few.scores + i) - shift));
        for (int64_t i = column; i < size; i += stride)
            for (int64_t lane = 0; lane < period; ++lane) sums[lane] += few.scores[i + lane];
        for (int64_t i = 0; i < period; i += 2) total[(column + i) / 2] = sums[i] + sums[i + 1];
    }
}

inline void round_weights(const FewRows &few) {
    auto *to = reinterpret_cast<uint16_t *>(few.weights);
    for (int64_t i = 0; i < few.pairs * few.vectors * 2; i += W) store_bf16(to + i, load(few.scores + i));
}

// sums [H, 32 columns from e on] += the values of `pairs` pairs of keys by their weights.
template <int H, typename Element>
inline void value_few(const uint32_t *weights, int64_t stride, const Element *const *rows, int64_t pairs, int64_t e, float *sums,
                      int64_t dim) {
    typedef uint16_t Halves __attribute__((vector_size(64)));
    V acc[H][2];
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h) acc[h][0] = load(sums + h * dim + e), acc[h][1] = load(sums + h * dim + e + W);
    for (int64_t i = 0; i < pairs; ++i) {
        const Halves even = (Halves)load_bf16_codes(rows[2 * i] + e), odd = (Halves)load_bf16_codes(rows[2 * i + 1] + e);
        // The columns 0 to 3 and 4 to 7 of every eight, as one instruction each can interleave them.
        const Halves near = __builtin_shufflevector(even, odd, 0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48,
                                                    17, 49, 18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59);
        const Halves far = __builtin_shufflevector(even, odd, 4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15, 47, 20, 52,
                                                   21, 53, 22, 54, 23, 55, 28, 60, 29, 61, 30, 62, 31, 63);
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

// Puts the columns of each 32 back in order.
inline void order_columns(const float *sums, int64_t dim, float *out) {
    for (int64_t e = 0; e < dim; e += COLUMNS) {
        const V near = load(sums + e), far = load(sums + e + W);
        store(out + e, __builtin_shufflevector(near, far, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23));
        store(out + e + W, __builtin_shufflevector(near, far, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31));
    }
}

inline FewRows make_few(void *scratch, const DecodeRow *rows, int64_t count, int64_t heads, int64_t dim) {
    FewRows few = {};
    few.heads = heads, few.dim = dim, few.queries = count * heads, few.vectors = vectors_of(few.queries);
    few.first = rows[0].first, few.last = rows[count - 1].last;
    few.first_pair = few.first / 2;
    const int64_t tile = few.vectors < 8 ? 8 / few.vectors : 1;  // pairs
    few.pairs = padded_to((few.last + 1) / 2 - few.first_pair, tile);
    few.scores = static_cast<float *>(scratch);
    few.sums = few.scores + (few.pairs * 2 + W) * few.vectors;
    few.weights = reinterpret_cast<uint32_t *>(few.sums + few.queries * dim);
    few.q = reinterpret_cast<uint16_t *>(few.weights + few.pairs * few.vectors);
    few.zeros = few.q + few.vectors * dim;
    return few;
}

inline size_t few_bytes(int64_t heads, int64_t dim) {
    const int64_t queries = heads > DECODE_QUERIES ? heads : DECODE_QUERIES, vectors = vectors_of(queries);
    const int64_t pairs = DECODE_KEYS / 2 + 8;
    return sizeof(float) * (size_t)((pairs * 2 + W) * vectors + queries * dim + pairs * vectors) +
           sizeof(uint16_t) * (size_t)((vectors + 1) * dim);
}

// The partial attention of DecodeRows, which see positions from `base` on; dim is a multiple of COLUMNS.
template <typename Element>
void attend_few(const DecodeRow *rows, int64_t count, int64_t heads, int64_t dim, const Keys &keys, void *scratch) {
    const FewRows few = make_few(scratch, rows, count, heads, dim);
    memset(few.q, 0, sizeof(uint16_t) * (size_t)((few.vectors + 1) * dim));
    for (int64_t m = 0; m < count; ++m) vector_ops_avx512.to_bf16(rows[m].q, heads * dim, few.q + m * heads * dim);
    auto *score = few.vectors >= 8   ? score_pairs<8, Element>
                  : few.vectors == 4 ? score_pairs<4, Element>
                                     : score_pairs<2, Element>;
    score(few, keys);
    if (keys.k_scale) scale_pairs(few, keys, keys.k_scale);
    for (int64_t m = 0; m < count; ++m) {
        hide_keys(few, m, 2 * few.first_pair, rows[m].first);
        hide_keys(few, m, rows[m].last, 2 * (few.first_pair + few.pairs));
    }
    float *top = few.sums, *total = top + few.vectors;  // free until values are summed: dim is COLUMNS or more
    largest_scores(few, top);
    weigh_pairs(few, top, total);
    for (int64_t m = 0; m < count; ++m) {
        memcpy(rows[m].top, top + m * heads, sizeof(float) * (size_t)heads);
        memcpy(rows[m].total, total + m * heads, sizeof(float) * (size_t)heads);
    }
    if (keys.v_scale) scale_pairs(few, keys, keys.v_scale);
    round_weights(few);
    memset(few.sums, 0, sizeof(float) * (size_t)(few.queries * dim));
    for (int64_t m = 0; m < count; ++m)
        if (rows[m].first % 2) value_half<Element>(few, keys, m, rows[m].first);
    value_pairs<Element>(few, keys, rows, count);
    for (int64_t m = 0; m < count; ++m)
        if (rows[m].last % 2 && rows[m].last > rows[m].first + rows[m].first % 2)
            value_half<Element>(few, keys, m, rows[m].last - 1);
    for (int64_t m = 0; m < count; ++m)
        for (int64_t h = 0; h < heads; ++h) order_columns(few.sums + (m * heads + h) * dim, dim, rows[m].out + h * dim);
}

}  // namespace
}  // namespace gemcutter
