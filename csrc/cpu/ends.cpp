// What stands before the first layer and after the last: embedding, per-layer embeddings, final norm, head.
//
// Refuses to know layers and how matrices are multiplied. Read `lines.h` for what lies between, `ops/reference.py` for what each
// sentence means.
#include "lines.h"
#include "region.h"
#include "repack.h"

namespace gemcutter {
namespace {

// Gathers rows of the table; of a source through a panel of this thread's own.
void gather_row(const gc_ple &ple, int64_t id, void *panel, float *out) {
    if (!ple.source) return products(ple.table).gather(&ple.table, id, out);
    gc_matrix row = ple.table;
    row.data = panel;
    repack_row(*ple.source, id, row);
    products(row).gather(&row, 0, out);
}

}  // namespace
}  // namespace gemcutter

// Every entry gives 0, or 1 if there is no memory for the rows on their way.

// out [count, D] = the table's rows that `ids` name, times `scale`.
GC_EXPORT int gc_embed(const gc_matrix *table, const int64_t *ids, int64_t count, float scale, float *out) {
    using namespace gemcutter;
    region([&](Team &team, int index) {
        Range own = own_rows(count, index, team.size);
        for (int64_t n = own.first; n < own.last; ++n) {
            float *row = out + n * table->columns;
            products(*table).gather(table, ids[n], row);
            kernels().words->multiply(row, scale, table->columns, row);
        }
    });
    return 0;
}

// out [rows, layers, P] = (table rows * token_scale + norm(x [rows, D] projected * context_scale)) / sqrt(2). Table rows are
// gathered by `ids`, or given as `tokens` [rows, layers, P].
GC_EXPORT int gc_ple_rows(const gc_ple *ple, const float *x, const int64_t *ids, const float *tokens, int64_t rows, float *out) {
    using namespace gemcutter;
    return in_arena([&](Arena &arena) {
        const gc_matrix &weight = ple->project;
        int64_t width = weight.rows, dim = ple->dim;
        RowForms forms = take_forms(arena, forms_of(&weight, 1, rows, ple->activations), rows, weight.columns, ple->activations);
        float *context = arena.array<float>(rows * width);
        Scratch scratch;
        size_t bytes = scratch_bytes(&weight, 1), panel = ple->source ? (size_t)ple->table.stride : 0;
        scratch.take(arena, bytes > panel ? bytes : panel);
        region([&](Team &team, int index) {
            const Words &words = *kernels().words;
            make_forms(team, index, forms, x);
            team.barrier();
            multiply(team, index, &weight, 1, forms.rows, context, width, scratch.of(index), 0);
            team.barrier();
            Range own = own_rows(rows, index, team.size);
            for (int64_t n = own.first; n < own.last; ++n) {
                float *row = out + n * width, *projected = context + n * width;
                if (!tokens) gather_row(*ple, ids[n], scratch.of(index), row);
                words.multiply(tokens ? tokens + n * width : row, ple->token_scale, width, row);
                words.multiply(projected, ple->context_scale, width, projected);
                for (int64_t at = 0; at < width; at += dim)
                    words.add_norm(row + at, projected + at, ple->norm, ple->eps, 0.707106781f, dim, row + at);
            }
        });
    });
}

// out [rows, n] = norm(x).
GC_EXPORT int gc_norm(const float *x, const float *weight, float eps, int64_t rows, int64_t n, float *out) {
    using namespace gemcutter;
    if (rows == 1) return kernels().words->rms_norm(x, weight, eps, n, out), 0;
    region([&](Team &team, int index) {
        Range own = own_rows(rows, index, team.size);
        for (int64_t row = own.first; row < own.last; ++row)
            kernels().words->rms_norm(x + row * n, weight, eps, n, out + row * n);
    });
    return 0;
}

// out [rows, V] = x [rows, D] times the head, squashed into (-cap, cap) if cap is not 0.
GC_EXPORT int gc_head(const gc_matrix *head, const float *x, int64_t rows, int activations, float cap, float *out) {
    using namespace gemcutter;
    return in_arena([&](Arena &arena) {
        RowForms forms = take_forms(arena, forms_of(head, 1, rows, activations), rows, head->columns, activations);
        Scratch scratch;
        scratch.take(arena, scratch_bytes(head, 1));
        region([&](Team &team, int index) {
            make_forms(team, index, forms, x);
            team.barrier();
            multiply(team, index, head, 1, forms.rows, out, head->rows, scratch.of(index), 0);
            if (cap == 0.0f) return;
            team.barrier();
            constexpr int64_t UNIT = 1024;
            Range own = share(rows * head->rows, UNIT, index, team.size);
            kernels().words->softcap(out + own.first, cap, own.last - own.first);
        });
    });
}
