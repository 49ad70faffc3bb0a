// Products with row-major matrices of bfloat16, float16 or float32, used in place; a panel is 16 neighbouring rows.
//
// Owns two kernels: a GEMV-like one that streams each matrix row past few activation rows, and a GEMM-like one that converts a
// chunk of the panel to float32 and transposes it once for many activation rows. Sums are float32. Refuses to know packed
// matrices and threads; read `matmul_f32.h` for the micro-kernel, `parallel_gemm.cpp` for how panels are shared among threads.
#include "kernels.h"
#include "matmul_f32.h"
#include "matrix_rows.h"

namespace gemcutter {
namespace {

constexpr int64_t K_CHUNK = 256;  // columns of one converted chunk: 16 KB, half of an L1 cache
// Up to here a row's result must not depend on the rows beside it, and converting a panel costs about what it saves.
constexpr int64_t GEMV_ROWS = FEW_ROWS;
constexpr int TILE_GEMV = 4;                                     // activation rows of one pass over a panel
constexpr int64_t AHEAD_ROWS = 2 * TILE_ROWS, AHEAD_LINES = 16;  // rows between which some lines of the next chunk are asked for
constexpr int64_t SPARE_ROWS = 64;                               // activation rows at a time of a panel that lacks rows

template <typename Type>
const typename Type::Element *elements_of(const gc_matrix &m, int64_t row) {
    return reinterpret_cast<const typename Type::Element *>(row_of(m, row));
}

// Activations are float32, or bfloat16 where the level rounds them.
inline V load_row(const float *p) { return load(p); }
inline V load_row(const uint16_t *p) { return load_bf16(p); }
inline float one_of(const float *p) { return *p; }
inline float one_of(const uint16_t *p) { return Bf16::one(p); }

// out[m * ld + r] = products of M activation rows with R matrix rows.
template <typename Type, int M, int R, typename X>
void gemv_tile(const gc_matrix &matrix, int64_t row, const X *x, float *out, int64_t ld) {
    constexpr int64_t LINE = 64 / sizeof(typename Type::Element);
    const typename Type::Element *w[R];
    for (int r = 0; r < R; ++r) w[r] = elements_of<Type>(matrix, row + r);
    V acc[M][R];
    for (int m = 0; m < M; ++m)
        for (int r = 0; r < R; ++r) acc[m][r] = set1(0.0f);
    int64_t columns = matrix.columns, ahead = matrix.stride <= SHORT_ROW ? R * matrix.stride : 0, k = 0;
    for (; k + W <= columns; k += W) {
        if (k % LINE == 0)
            for (int r = 0; r < R; ++r) __builtin_prefetch(reinterpret_cast<const char *>(w[r] + k) + ahead);
        V wide[R];
        for (int r = 0; r < R; ++r) wide[r] = Type::vector(w[r] + k);
        for (int m = 0; m < M; ++m) {
            V value = load_row(x + m * columns + k);
            for (int r = 0; r < R; ++r) acc[m][r] = fma(value, wide[r], acc[m][r]);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int r = 0; r < R; ++r) {
            float total = sum(acc[m][r]);
            for (int64_t i = k; i < columns; ++i) total += one_of(x + m * columns + i) * Type::one(w[r] + i);
            out[m * ld + r] = total;
        }
}

template <typename Type, int M, typename X>
void gemv_rows(const gc_matrix &matrix, int64_t first, int64_t last, const X *x, float *out, int64_t ld) {
    // Sums that fit the registers, and are enough for the latency of their additions.
#if defined(GC_LEVEL_NEON)
    constexpr int R = M == 1 ? 8 : 4;
#else
    constexpr int R = M > 2 && W < 16 ? 2 : 4;
#endif
    int64_t row = first;
    for (; row + R <= last; row += R) gemv_tile<Type, M, R>(matrix, row, x, out + row - first, ld);
    for (; row < last; ++row) gemv_tile<Type, M, 1>(matrix, row, x, out + row - first, ld);
}

// In equal passes; after the first one the panel is in the cache.
template <typename Type, typename X>
void gemv(const gc_matrix &matrix, int64_t first, int64_t last, const X *x, int64_t count, float *out, int64_t ld) {
    for (int64_t passes = (count + TILE_GEMV - 1) / TILE_GEMV; passes > 0; --passes) {
        const int64_t some = (count + passes - 1) / passes;
        auto *run = some == 1   ? gemv_rows<Type, 1, X>
                    : some == 2 ? gemv_rows<Type, 2, X>
                    : some == 3 ? gemv_rows<Type, 3, X>
                                : gemv_rows<Type, TILE_GEMV, X>;
        run(matrix, first, last, x, out, ld);
        count -= some, x += some * matrix.columns, out += some * ld;
    }
}

// What is read after the columns before k: the columns from there on, or the first ones of the next panel. A row's next chunk is on
// another page, where the hardware looks no further, and waiting for it costs up to a third of the products of 64 rows.
template <typename Type>
LinesAhead<IN_L1> next_chunk(const gc_matrix &matrix, int64_t first, int64_t k) {
    constexpr int64_t SIZE = sizeof(typename Type::Element);
    if (k >= matrix.columns) first += PANEL, k = 0;
    const int64_t columns = matrix.columns - k < K_CHUNK ? matrix.columns - k : K_CHUNK;
    return lines_of_rows<IN_L1>(matrix, first, PANEL, k * SIZE, columns * SIZE);
}

// out [count, 16] = activation rows times matrix rows first..first+15; those from `last` on repeat the one before.
template <typename Type>
void gemm(const gc_matrix &matrix, int64_t first, int64_t last, const float *x, int64_t count, float *out, int64_t ld,
          float *scratch) {
    for (int64_t k = 0; k < matrix.columns; k += K_CHUNK) {
        const typename Type::Element *rows[PANEL];
        for (int64_t r = 0; r < PANEL; ++r) rows[r] = elements_of<Type>(matrix, first + r < last ? first + r : last - 1) + k;
        int64_t columns = matrix.columns - k < K_CHUNK ? matrix.columns - k : K_CHUNK;
        pack_panel<Type>(rows, columns, scratch);
        LinesAhead<IN_L1> ahead = next_chunk<Type>(matrix, first, k + columns);
        for (int64_t m = 0; m < count; m += AHEAD_ROWS) {
            int64_t some = count - m < AHEAD_ROWS ? count - m : AHEAD_ROWS;
            ahead.some(AHEAD_LINES);
            gemm_panel(x + m * matrix.columns + k, matrix.columns, some, scratch, columns, out + m * ld, ld, k > 0);
        }
    }
}

template <typename Type>
void gemm_ragged(const gc_matrix &matrix, int64_t first, int64_t last, const float *x, int64_t count, float *out, int64_t ld,
                 float *scratch) {
    float *spare = scratch + K_CHUNK * PANEL;
    for (int64_t m = 0; m < count; m += SPARE_ROWS) {
        int64_t some = count - m < SPARE_ROWS ? count - m : SPARE_ROWS;
        gemm<Type>(matrix, first, last, x + m * matrix.columns, some, spare, PANEL, scratch);
        for (int64_t i = 0; i < some; ++i) memcpy(out + (m + i) * ld, spare + i * PANEL, sizeof(float) * (size_t)(last - first));
    }
}

template <typename Type>
void panel_type(const gc_matrix &matrix, int64_t panel, const Rows &rows, int64_t begin, int64_t end, float *out, int64_t ld,
                float *scratch) {
    int64_t first = panel * PANEL, last = first + PANEL < matrix.rows ? first + PANEL : matrix.rows, count = end - begin;
    const float *x = rows.x + begin * matrix.columns;
    if (count <= GEMV_ROWS) {
        // A level that multiplies many rows in bfloat16 rounds few ones, too: results hardly depend on their number, then.
        const bool is_rounded = rows.bf16 && matrix.codes == GC_BF16 && rows.activations != GC_FLOAT_ROWS;
        if (is_rounded) return gemv<Type>(matrix, first, last, rows.bf16 + begin * matrix.columns, count, out, ld);
        return gemv<Type>(matrix, first, last, x, count, out, ld);
    }
    auto *run = last - first == PANEL ? gemm<Type> : gemm_ragged<Type>;
    run(matrix, first, last, x, count, out, ld, scratch);
}

int formats(const gc_matrix *, int64_t, int) { return FORMAT_FLOAT; }

void gemm_panels(const gc_matrix *matrix, int64_t panel, int64_t, const Rows *rows, int64_t first, int64_t last, float *out,
                 int64_t ld, void *scratch, const void *) {
    auto *run = matrix->codes == GC_BF16 ? panel_type<Bf16> : matrix->codes == GC_F16 ? panel_type<F16> : panel_type<F32>;
    run(*matrix, panel, *rows, first, last, out, ld, static_cast<float *>(scratch));
}

size_t scratch_bytes(const gc_matrix *) { return sizeof(float) * (K_CHUNK + SPARE_ROWS) * PANEL; }

template <typename Type>
void gather_type(const gc_matrix &matrix, int64_t row, float *out) {
    const typename Type::Element *from = elements_of<Type>(matrix, row);
    int64_t k = 0;
    for (; k + W <= matrix.columns; k += W) store(out + k, Type::vector(from + k));
    for (; k < matrix.columns; ++k) out[k] = Type::one(from + k);
}

void gather(const gc_matrix *matrix, int64_t row, float *out) {
    auto *run = matrix->codes == GC_BF16 ? gather_type<Bf16> : matrix->codes == GC_F16 ? gather_type<F16> : gather_type<F32>;
    run(*matrix, row, out);
}

Blocking blocking(const gc_matrix *m) { return {1, most_rows(CHUNK_ELEMENTS, m->columns, CHUNK_ROWS)}; }

}  // namespace

extern const MatmulKernels GC_NAME(dense) = {formats, gemm_panels, scratch_bytes, gather, blocking};

}  // namespace gemcutter
