// What attention of few query rows has in its scratch memory, for products of vectors and of tiles. Included by
// attention_few_dot.h and attention_few_tiles.h only.
//
// Owns the layout: a score vector has one lane for each query vector and each of two neighbouring keys, so that softmax needs no
// sums across lanes and its weights, rounded to bfloat16, are the pairs that values are multiplied with. Shape letters: V query
// vectors (rows times heads, rounded up to whole tiles), E head dim, P pairs of keys.
#pragma once
#include "attention_rows.h"
#include "matmul_f32.h"
#include "softmax_bf16.h"

namespace gemcutter {
namespace {

constexpr int64_t COLUMNS = 2 * W;  // of one vector of bfloat16

// Query vectors in whole tiles, and pairs of keys that are scored or weighed at once, which begin at multiples of their number.
#if defined(GC_LEVEL_AMX)
inline int64_t vectors_of(int64_t queries) { return queries > 8 ? padded_to(queries, 16) : 8; }
inline int64_t pairs_at_once(int64_t) { return 16; }
#else
inline int64_t vectors_of(int64_t queries) { return queries > 4 ? padded_to(queries, 8) : queries > 2 ? 4 : 2; }
inline int64_t pairs_at_once(int64_t vectors) { return vectors < 8 ? 8 / vectors : 1; }
#endif
constexpr int64_t MOST_PAIRS_AT_ONCE = 16;

struct FewRows {
    int64_t heads, dim, queries, vectors;  // `queries` of V exist
    int64_t first, last;                   // positions that some row sees
    int64_t first_pair, pairs;             // of the scores: whole tiles, with keys that nobody sees at either end
    uint16_t *q;                           // [V, E]
    float *scores;                         // [P, V, 2]
    uint32_t *weights;                     // [P, V], two bfloat16 each
    float *sums;                           // [V, E], the columns of each 32 as `value_tile` leaves them
    uint16_t *zeros;                       // [E]
    uint32_t *q_pairs;                     // of AMX: [V / 16, E / 2, 16], rounded up to 16 vectors
    uint16_t *copies;                      // of AMX: [16, E], of keys
    float *spare;                          // of AMX: [V, E]
};

// A position, or where no row sees it, the nearest that one does.
inline int64_t nearest_seen(const FewRows &few, int64_t t) { return t < few.first ? few.first : t < few.last ? t : few.last - 1; }

// 32 elements as bfloat16.
inline __m512i load_bf16_codes(const uint16_t *p) { return _mm512_loadu_si512(p); }
inline __m512i load_bf16_codes(const int8_t *p) { return (__m512i)_mm512_cvtne2ps_pbh(S8::vector(p + W), S8::vector(p)); }

// Two rows of 32 columns as pairs: the columns 0 to 3 and 4 to 7 of every eight, as one instruction each can interleave them.
typedef uint16_t Halves __attribute__((vector_size(64)));
inline Halves near_columns(Halves even, Halves odd) {
    return __builtin_shufflevector(even, odd, 0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48, 17, 49, 18, 50,
                                   19, 51, 24, 56, 25, 57, 26, 58, 27, 59);
}
inline Halves far_columns(Halves even, Halves odd) {
    return __builtin_shufflevector(even, odd, 4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15, 47, 20, 52, 21, 53, 22, 54,
                                   23, 55, 28, 60, 29, 61, 30, 62, 31, 63);
}

}  // namespace
}  // namespace gemcutter
