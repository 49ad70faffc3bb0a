// The second half of adapters' changes: few columns of float32 rows times panels of an up factor, added to a product.
//
// Owns one kernel, with a panel in registers for some rows at a time. Read `adapters.cpp` for who calls it.
#include "kernels.h"
#include "matmul_f32.h"

namespace gemcutter {
namespace {

constexpr int ROWS = 4;  // that share the loads of a panel

template <typename Type, int M>
void add_tile(const typename Type::Element *up, int64_t rank, const float *low, int64_t stride, int64_t width, float *out,
              int64_t ld) {
    V acc[M][PANEL_VECTORS];
    for (int m = 0; m < M; ++m)
        for (int c = 0; c < PANEL_VECTORS; ++c) acc[m][c] = set1(0.0f);
    for (int64_t i = 0; i < rank; ++i) {
        V b[PANEL_VECTORS];
        for (int c = 0; c < PANEL_VECTORS; ++c) b[c] = Type::vector(up + i * PANEL + c * W);
        for (int m = 0; m < M; ++m) {
            const V x = set1(low[m * stride + i]);
            for (int c = 0; c < PANEL_VECTORS; ++c) acc[m][c] = fma(x, b[c], acc[m][c]);
        }
    }
    const V one = set1(1.0f);
    for (int m = 0; m < M; ++m) {
        float *to = out + m * ld, spare[PANEL] = {};
        const bool is_whole = width == PANEL;
        if (!is_whole) memcpy(spare, to, sizeof(float) * (size_t)width);
        float *at = is_whole ? to : spare;
        for (int c = 0; c < PANEL_VECTORS; ++c) store(at + c * W, fma(acc[m][c], one, load(at + c * W)));
        if (!is_whole) memcpy(to, spare, sizeof(float) * (size_t)width);
    }
}

template <typename Type>
void add_rows(const void *up, int64_t rank, const float *low, int64_t stride, int64_t rows, int64_t width, float *out,
              int64_t ld) {
    const auto *panel = static_cast<const typename Type::Element *>(up);
    for (; rows >= ROWS; rows -= ROWS, low += ROWS * stride, out += ROWS * ld)
        add_tile<Type, ROWS>(panel, rank, low, stride, width, out, ld);
    for (; rows > 0; --rows, low += stride, out += ld) add_tile<Type, 1>(panel, rank, low, stride, width, out, ld);
}

}  // namespace

void GC_NAME(add_low_rank)(const void *up, int32_t codes, int64_t rank, const float *low, int64_t stride, int64_t rows,
                           int64_t width, float *out, int64_t ld) {
    auto *run = codes == GC_BF16 ? add_rows<Bf16> : add_rows<F32>;
    run(up, rank, low, stride, rows, width, out, ld);
}

}  // namespace gemcutter
