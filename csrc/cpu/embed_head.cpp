// The ops before the first layer and after the last: embedding, per-layer embeddings, final norm, LM head.
//
// Owns their entry points; refuses to know layers and how matrices are multiplied. Read `layer_ops.h` for the layers between,
// `ops/reference.py` for the definition of each op.
#include "bounds.h"
#include "layer_ops.h"
#include "parallel_region.h"
#include "repack.h"

namespace gemcutter {
namespace {

// Gathers one row of the table; a row in a file's format is first repacked into `panel`, which belongs to this thread.
void gather_row(const gc_ple &ple, int64_t id, void *panel, float *out) {
    if (!ple.source) return matmul_kernels(ple.table).gather(&ple.table, id, out);
    gc_matrix row = ple.table;
    row.data = panel;
    repack_row(*ple.source, id, row);
    matmul_kernels(row).gather(&row, 0, out);
}

}  // namespace
}  // namespace gemcutter

// Every entry returns 0, 1 if memory for intermediate activations ran out, or OUT_OF_BOUNDS for an id without a row.

// out [count, D] = the table's rows that `ids` name, times `scale`.
GC_EXPORT int gc_embed(const gc_matrix *table, const int64_t *ids, int64_t count, float scale, float *out) {
    using namespace gemcutter;
    if (!are_inside(ids, count, table->rows)) return OUT_OF_BOUNDS;
    parallel_region([&](ThreadPool &pool, int index) {
        Range own = own_rows(count, index, pool.size);
        for (int64_t n = own.first; n < own.last; ++n) {
            float *row = out + n * table->columns;
            matmul_kernels(*table).gather(table, ids[n], row);
            kernels().vector_ops->scale(row, scale, table->columns, row);
        }
    });
    return 0;
}

// out [count, layers, P] = the table's rows that `ids` name: to be given to `gc_ple_embed` as `tokens`, which may be its `out`.
GC_EXPORT int gc_gather_ple(const gc_ple *ple, const int64_t *ids, int64_t count, float *out) {
    using namespace gemcutter;
    if (!are_inside(ids, count, ple->vocab)) return OUT_OF_BOUNDS;
    return in_arena([&](Arena &arena) {
        Scratch panels;
        panels.allocate(arena, ple->source ? (size_t)ple->table.stride : 0);
        parallel_region([&](ThreadPool &pool, int index) {
            Range own = own_rows(count, index, pool.size);
            for (int64_t n = own.first; n < own.last; ++n)
                gather_row(*ple, ids[n], panels.of(index), out + n * ple->projection.rows);
        });
    });
}

// out [rows, layers, P] = (table rows * token_scale + norm(x [rows, D] projected * context_scale)) / sqrt(2). Table rows are
// gathered by `ids`, or given as `tokens` [rows, layers, P]. `adapters` [rows], or null, are those that rows ask for.
GC_EXPORT int gc_ple_embed(const gc_ple *ple, const float *x, const int64_t *ids, const float *tokens, int64_t rows,
                           const int32_t *adapters, float *out) {
    using namespace gemcutter;
    if (!tokens && !are_inside(ids, rows, ple->vocab)) return OUT_OF_BOUNDS;
    return in_arena([&](Arena &arena) {
        const gc_matrix &weight = ple->projection;
        int64_t width = weight.rows, dim = ple->dim;
        ConvertedRows converted =
            allocate_rows(arena, formats_of(&weight, 1, rows, ple->activations), rows, weight.columns, ple->activations);
        float *context = arena.array<float>(rows * width);
        const AdapterRuns runs(arena, adapters, rows);
        LowRank changes;
        changes.allocate(arena, runs, {&weight});
        Scratch scratch;
        size_t bytes = scratch_bytes(&weight, 1), panel = ple->source ? (size_t)ple->table.stride : 0;
        scratch.allocate(arena, bytes > panel ? bytes : panel);
        parallel_region([&](ThreadPool &pool, int index) {
            const VectorOps &ops = *kernels().vector_ops;
            convert_rows(pool, index, converted, x);
            changes.reduce(pool, index, x);
            pool.barrier();
            parallel_gemm(pool, index, &weight, 1, converted.rows, context, width, scratch.of(index), 0, changes);
            pool.barrier();
            Range own = own_rows(rows, index, pool.size);
            for (int64_t n = own.first; n < own.last; ++n) {
                float *row = out + n * width, *projected = context + n * width;
                if (!tokens) gather_row(*ple, ids[n], scratch.of(index), row);
                ops.scale(tokens ? tokens + n * width : row, ple->token_scale, width, row);
                ops.scale(projected, ple->context_scale, width, projected);
                for (int64_t at = 0; at < width; at += dim)
                    ops.add_norm(row + at, projected + at, ple->norm, ple->eps, 0.707106781f, dim, row + at);
            }
        });
    });
}

// out [rows, n] = norm(x).
GC_EXPORT int gc_final_norm(const float *x, const float *weight, float eps, int64_t rows, int64_t n, float *out) {
    using namespace gemcutter;
    if (rows == 1) return kernels().vector_ops->rms_norm(x, weight, eps, n, out), 0;
    parallel_region([&](ThreadPool &pool, int index) {
        Range own = own_rows(rows, index, pool.size);
        for (int64_t row = own.first; row < own.last; ++row)
            kernels().vector_ops->rms_norm(x + row * n, weight, eps, n, out + row * n);
    });
    return 0;
}

// out [rows, V] = x [rows, D] times the head, with tanh soft-capping to (-cap, cap) if cap is not 0.
GC_EXPORT int gc_lm_head(const gc_matrix *head, const float *x, int64_t rows, int activations, float cap, float *out) {
    using namespace gemcutter;
    return in_arena([&](Arena &arena) {
        ConvertedRows converted = allocate_rows(arena, formats_of(head, 1, rows, activations), rows, head->columns, activations);
        Scratch scratch;
        scratch.allocate(arena, scratch_bytes(head, 1));
        parallel_region([&](ThreadPool &pool, int index) {
            convert_rows(pool, index, converted, x);
            pool.barrier();
            parallel_gemm(pool, index, head, 1, converted.rows, out, head->rows, scratch.of(index), 0);
            if (cap == 0.0f) return;
            pool.barrier();
            constexpr int64_t UNIT = 1024;
            Range own = share(rows * head->rows, UNIT, index, pool.size);
            kernels().vector_ops->softcap(out + own.first, cap, own.last - own.first);
        });
    });
}
