// Products of activation rows with whole matrices, parallel over the thread pool.
//
// Owns the work sharing: what is a work item, which thread computes it, and how activations are converted to the formats that
// kernels read. Few rows (decode) are bound by memory: each thread streams its own range of panels, and the last quarter is
// handed out dynamically in small parts, since cores are seldom equally fast. Many rows (prefill) are bound by arithmetic: an
// item is one panel times one chunk of rows, so that a panel stays in the L1 cache and the chunk in L2. Refuses to know the
// layout of matrices: `packed.cpp` and `dense.cpp` know that.
#include "parallel_region.h"

#include <stdlib.h>
#include <string.h>

#include <new>
#include <type_traits>

namespace gemcutter {
namespace {

constexpr size_t ALIGNMENT = 64, LEAST_CHUNK = (size_t)1 << 20;
constexpr int64_t ITEMS_OF_THREAD = 6;

size_t align(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

// Rows that are multiplied with one group of panels after the other: what fits the caches, and fewer where threads would else
// get too little work to share evenly.
int64_t chunk_rows(int64_t most, const Rows &rows, int64_t groups, int threads) {
    int64_t chunks = (rows.count + most - 1) / most, wanted = (ITEMS_OF_THREAD * threads + groups - 1) / groups;
    if (threads > 1 && chunks < wanted) chunks = wanted;
    int64_t each = (rows.count + chunks - 1) / chunks;
    return (each + ROW_UNIT - 1) / ROW_UNIT * ROW_UNIT;
}

// The panels that are assigned to a thread in products of few rows.
Range own_panels(int64_t panels, int index, int size) { return share(size == 1 ? panels : panels - panels / 4, 1, index, size); }

// Calls item(group of panels, first row, last row) once for all groups and rows, on some thread of the pool; `chunk` rows at a
// time. FEW_ROWS or less at the end join the chunk before: kernels for few rows round otherwise, and how many chunks there are
// depends on the threads.
template <typename Item>
void for_each_group(ThreadPool &pool, int64_t groups, int64_t rows, int64_t chunk, int counter, Item item) {
    int64_t chunks = rows > chunk + FEW_ROWS ? (rows - FEW_ROWS + chunk - 1) / chunk : 1, items = groups * chunks;
    for (int64_t i; (i = pool.counters[counter].fetch_add(1, std::memory_order_relaxed)) < items;) {
        int64_t index = i / groups, first = index * chunk;
        item(i % groups, first, index + 1 < chunks ? first + chunk : rows);
    }
}

// Calls item(panel) once for all panels, on some thread of the pool, where there are few rows.
template <typename Item>
void for_each_panel(ThreadPool &pool, int index, int64_t panels, int counter, Item item) {
    std::atomic<int64_t> &next = pool.counters[counter];
    if (!pool.is_memory_bound.load(std::memory_order_relaxed)) pool.is_memory_bound.store(true, std::memory_order_relaxed);
    Range own = own_panels(panels, index, pool.size);
    int64_t owned = own_panels(panels, pool.size - 1, pool.size).last;
    for (int64_t panel = own.first; panel < own.last; ++panel) item(panel);
    int64_t piece = panels / (32 * pool.size) + 1;
    for (int64_t start; (start = owned + next.fetch_add(piece, std::memory_order_relaxed)) < panels;)
        for (int64_t panel = start; panel < start + piece && panel < panels; ++panel) item(panel);
}

int64_t pair_elements(const Rows &rows) { return padded_to(rows.count, PANEL) * rows.columns / 2; }

// Rows as kernels on this thread read them: pairs, where they are wanted, lie in the thread's own part of their memory.
Rows with_own_pairs(const Rows &rows, int index) {
    if (!rows.pairs) return rows;
    Rows own = rows;
    own.pairs += index * pair_elements(rows);
    kernels().pair_rows(rows.bf16, rows.count, rows.columns, const_cast<uint32_t *>(own.pairs));
    return own;
}

// parallel_gemm for many rows.
void gemm_of_many(ThreadPool &pool, const gc_matrix *parts, int num_parts, const Rows &rows, float *out, int64_t ld,
                  void *scratch, int counter, const LowRank &changes) {
    int64_t groups = 0;
    for (int i = 0; i < num_parts; ++i) groups += groups_of(parts[i], blocking_of(parts[i]).panels);
    int64_t chunk = chunk_rows(blocking_of(*parts).rows, rows, groups, pool.size);
    for_each_group(pool, groups, rows.count, chunk, counter, [&](int64_t group, int64_t first, int64_t last) {
        const gc_matrix *part = parts;
        float *to = out + first * ld;
        for (int64_t own; group >= (own = groups_of(*part, blocking_of(*part).panels)); ++part) {
            group -= own;
            to += part->rows;
        }
        const int64_t at_once = blocking_of(*part).panels;
        Panels some = panels_of_group(*part, group, at_once);
        to += some.first * PANEL;
        matmul_kernels(*part).gemm_panels(part, some.first, some.count, &rows, first, last, to, ld, scratch,
                                          panel_at(*part, some.first + pool.size * at_once));
        changes.add(part - parts, some.first, some.count, first, last, to, ld);
    });
}

}  // namespace

int64_t panels_of(const gc_matrix &m) { return (m.rows + PANEL - 1) / PANEL; }

int64_t panels_at_once(const gc_matrix &a, const gc_matrix &b) {
    int64_t of_a = blocking_of(a).panels, of_b = blocking_of(b).panels;
    return of_a < of_b ? of_a : of_b;
}

int64_t groups_of(const gc_matrix &m, int64_t at_once) { return (panels_of(m) + at_once - 1) / at_once; }

Panels panels_of_group(const gc_matrix &m, int64_t group, int64_t at_once) {
    int64_t first = group * at_once, left = panels_of(m) - first, count = left < at_once ? left : at_once;
    int64_t rows = m.rows - first * PANEL;
    return {first, count, rows < count * PANEL ? rows : count * PANEL};
}

struct Arena::Chunk {
    Chunk *next;
    size_t size, used;
    char *memory() { return reinterpret_cast<char *>(this) + align(sizeof(Chunk)); }
};

void *Arena::allocate(size_t bytes) {
    bytes = align(bytes ? bytes : 1);
    if (!chunks_ || chunks_->size - chunks_->used < bytes) {
        size_t size = chunks_ ? chunks_->size * 2 : LEAST_CHUNK;
        if (size < bytes) size = bytes;
        void *memory = ::operator new(align(sizeof(Chunk)) + size, std::align_val_t(ALIGNMENT));
        chunks_ = new (memory) Chunk{chunks_, size, 0};
    }
    void *taken = chunks_->memory() + chunks_->used;
    chunks_->used += bytes;
    return taken;
}

// Keeps the newest chunk, which is the largest: after some regions one chunk is enough for all of them.
void Arena::clear() {
    if (!chunks_) return;
    while (Chunk *older = chunks_->next) {
        chunks_->next = older->next;
        ::operator delete(older, std::align_val_t(ALIGNMENT));
    }
    chunks_->used = 0;
}

Arena::Mark Arena::mark() const { return {chunks_, chunks_ ? chunks_->used : 0}; }

void Arena::rewind(const Mark &mark) {
    if (chunks_) chunks_->used = chunks_ == mark.chunk ? mark.used : 0;  // a chunk allocated after the mark is free as a whole
}

Arena &thread_arena() {
    static thread_local Arena arena;
    return arena;
}

Arena::~Arena() {
    clear();
    if (chunks_) ::operator delete(chunks_, std::align_val_t(ALIGNMENT));
}

int formats_of(const gc_matrix *parts, int num_parts, int64_t count, int activations) {
    int formats = 0;
    for (int i = 0; i < num_parts; ++i) formats |= matmul_kernels(parts[i]).formats(&parts[i], count, activations);
    return formats;
}

ConvertedRows allocate_rows(Arena &arena, int formats, int64_t count, int64_t columns, int activations, const int32_t *order) {
    int64_t all = count + SPARE_ROWS;
    Rows rows = {};
    rows.count = count, rows.columns = columns, rows.activations = activations;
    if (formats & FORMAT_INT8) {
        rows.q = arena.array<int8_t>(all * columns);
        rows.scale = arena.array<float>(all * (columns / BLOCK));
        rows.sum = arena.array<float>(all * (columns / BLOCK));
    }
    if (formats & FORMAT_HALVES) rows.halves = arena.array<float>(all * 2 * (columns / BLOCK));
    if (formats & FORMAT_BF16) rows.bf16 = arena.array<uint16_t>(all * columns);
    if (formats & FORMAT_PAIRS && count > 1) rows.pairs = arena.array<uint32_t>(threads() * pair_elements(rows));
    if (formats & FORMAT_TILES) rows.tiles = arena.array<uint16_t>(padded_to(count, 16) * columns);
    float *gathered = order ? arena.array<float>(count * columns) : nullptr;
    if (gathered) rows.x = gathered;
    else if (formats & FORMAT_FLOAT && activations == GC_BF16_ROWS) rows.x = arena.array<float>(count * columns);
    return {formats, order, gathered, rows};
}

void convert_row(ConvertedRows &converted, int64_t row, const float *x_row) {
    const VectorOps &ops = *kernels().vector_ops;
    const Rows &rows = converted.rows;  // its pointers are const for kernels; allocate_rows allocated the memory for writing here
    int64_t columns = rows.columns, at = row * columns, block = row * (columns / BLOCK);
    if (converted.order) {
        float *gathered = converted.gathered + at;
        for (int64_t i = 0; i < columns; ++i) gathered[i] = x_row[converted.order[i]];
        x_row = gathered;
    }
    if (converted.formats & FORMAT_INT8)
        ops.quantize(x_row, columns, const_cast<int8_t *>(rows.q) + at, const_cast<float *>(rows.scale) + block,
                     const_cast<float *>(rows.sum) + block);
    if (converted.formats & FORMAT_HALVES)
        ops.sum_halves(rows.q + at, rows.scale + block, columns, const_cast<float *>(rows.halves) + 2 * block);
    uint16_t *bf16 = converted.formats & FORMAT_BF16 ? const_cast<uint16_t *>(rows.bf16) + at : nullptr;
    if (bf16) ops.to_bf16(x_row, columns, bf16);
    for (int64_t column = 0; converted.formats & FORMAT_TILES && column < columns; column += BLOCK)
        ops.to_bf16(x_row + column, BLOCK, const_cast<uint16_t *>(rows.tiles) + place_in_tiles(columns, row, column));
    if (!(converted.formats & FORMAT_FLOAT) || rows.activations != GC_BF16_ROWS) return;
    float *x = const_cast<float *>(rows.x) + at;
    if (bf16) return ops.from_bf16(bf16, columns, x);
    constexpr int64_t PIECE = 256;
    uint16_t rounded[PIECE];
    for (int64_t start = 0; start < columns; start += PIECE) {
        int64_t count = columns - start < PIECE ? columns - start : PIECE;
        ops.to_bf16(x_row + start, count, rounded);
        ops.from_bf16(rounded, count, x + start);
    }
}

void copy_row(const Rows &from, int64_t row, Rows &to, int64_t place) {
    int64_t columns = from.columns, blocks = columns / BLOCK;
    auto copy = [&](auto *source, auto *target, int64_t size) {
        if (!source || !target) return;
        using Element = std::remove_const_t<std::remove_pointer_t<decltype(target)>>;
        memcpy(const_cast<Element *>(target) + place * size, source + row * size, sizeof(Element) * (size_t)size);
    };
    copy(from.x, to.x, columns);
    copy(from.q, to.q, columns);
    copy(from.scale, to.scale, blocks);
    copy(from.sum, to.sum, blocks);
    copy(from.halves, to.halves, 2 * blocks);
    copy(from.bf16, to.bf16, columns);
}

void convert_rows(ThreadPool &pool, int index, ConvertedRows &converted, const float *x) {
    bool keeps_x = converted.formats & FORMAT_FLOAT && converted.rows.activations != GC_BF16_ROWS && !converted.order;
    if (keeps_x && index == 0) converted.rows.x = x;  // visible to all threads after the caller's barrier
    Range own = share(converted.rows.count, 1, index, pool.size);
    for (int64_t row = own.first; row < own.last; ++row) convert_row(converted, row, x + row * converted.rows.columns);
}

void parallel_gemm(ThreadPool &pool, int index, const gc_matrix *parts, int num_parts, const Rows &all_rows, float *out,
                   int64_t ld, void *scratch, int counter, const LowRank &changes) {
    const Rows rows = with_own_pairs(all_rows, index);
    if (rows.count > FEW_ROWS) return gemm_of_many(pool, parts, num_parts, rows, out, ld, scratch, counter, changes);
    int64_t panels = 0;
    for (int i = 0; i < num_parts; ++i) panels += panels_of(parts[i]);
    for_each_panel(pool, index, panels, counter, [&](int64_t panel) {
        const gc_matrix *part = parts;
        float *column = out;
        for (; panel >= panels_of(*part); ++part) {
            panel -= panels_of(*part);
            column += part->rows;
        }
        bool is_last = panel + 1 == panels_of(*part) && part + 1 < parts + num_parts;
        const void *next = is_last ? part[1].data : nullptr;
        column += panel * PANEL;
        matmul_kernels(*part).gemm_panels(part, panel, 1, &rows, 0, rows.count, column, ld, scratch, next);
        changes.add(part - parts, panel, 1, 0, rows.count, column, ld);
    });
}

void geglu_panels(const gc_matrix &gate, const gc_matrix &up, const Panels &panels, const Rows &rows, int64_t first, int64_t last,
                  const GatedRows &out, void *scratch, const LowRank &changes) {
    int64_t count = last - first, across = panels.count * PANEL, size = count * across;
    float *gates = static_cast<float *>(scratch), *ups = gates + size;
    void *rest = ups + size;
    if (panels.width < across) memset(gates, 0, sizeof(float) * (size_t)(2 * size));
    const void *up_at = panel_at(up, panels.first), *next = panel_at(gate, panels.first + panels.count);
    matmul_kernels(gate).gemm_panels(&gate, panels.first, panels.count, &rows, first, last, gates, across, rest, up_at);
    matmul_kernels(up).gemm_panels(&up, panels.first, panels.count, &rows, first, last, ups, across, rest, next);
    changes.add(0, panels.first, panels.count, first, last, gates, across);
    changes.add(1, panels.first, panels.count, first, last, ups, across);
    const VectorOps &ops = *kernels().vector_ops;
    ops.gelu_mul(gates, ups, size, gates);
    const int64_t start = panels.first * PANEL;
    for (int64_t m = 0; m < count; ++m, gates += across) {
        const int64_t row = first + m;
        if (!out.tiles) memcpy(out.x + row * out.columns + start, gates, sizeof(float) * (size_t)panels.width);
        for (int64_t column = 0; out.tiles && column < panels.width; column += BLOCK)
            ops.to_bf16(gates + column, BLOCK, out.tiles + place_in_tiles(out.columns, row, start + column));
    }
}

void parallel_geglu(ThreadPool &pool, int index, const gc_matrix *gate, const gc_matrix *up, const Rows &all_rows,
                    const GatedRows &out, void *scratch, int counter, const LowRank &changes) {
    const Rows rows = with_own_pairs(all_rows, index);
    auto item = [&](const Panels &panels, int64_t first, int64_t last) {
        geglu_panels(*gate, *up, panels, rows, first, last, out, scratch, changes);
    };
    if (rows.count <= FEW_ROWS)
        return for_each_panel(pool, index, panels_of(*gate), counter,
                              [&](int64_t panel) { item(panels_of_group(*gate, panel, 1), 0, rows.count); });
    int64_t at_once = panels_at_once(*gate, *up), groups = groups_of(*gate, at_once);
    int64_t chunk = chunk_rows(blocking_of(*gate).rows, rows, groups, pool.size);
    for_each_group(pool, groups, rows.count, chunk, counter, [&](int64_t group, int64_t first, int64_t last) {
        item(panels_of_group(*gate, group, at_once), first, last);
    });
}

void prefetch_weights(const ThreadPool &pool, int index, const gc_matrix *parts, int num_parts, int64_t count) {
    if (count > FEW_ROWS) return;
    int64_t panels = 0;
    for (int i = 0; i < num_parts; ++i) panels += panels_of(parts[i]);
    int64_t panel = own_panels(panels, index, pool.size).first;
    if (panel >= panels) return;
    for (; panel >= panels_of(*parts); ++parts) panel -= panels_of(*parts);
    auto *bytes = static_cast<const char *>(panel_at(*parts, panel));
    for (int64_t at = 0; at < PREFETCH_BYTES; at += 64) __builtin_prefetch(bytes + at);
}

size_t scratch_bytes(const gc_matrix *parts, int num_parts) {
    size_t most = 0;
    for (int i = 0; i < num_parts; ++i) {
        size_t bytes = align(matmul_kernels(parts[i]).scratch_bytes(&parts[i]));
        if (bytes > most) most = bytes;
    }
    return most;
}

int64_t most_chunk_rows(const gc_matrix &m, int64_t rows) {
    int64_t most = blocking_of(m).rows + FEW_ROWS;
    return rows < most ? rows : most;
}

size_t geglu_scratch_bytes(const gc_matrix *gate, const gc_matrix *up, int64_t rows) {
    size_t products = align(sizeof(float) * (size_t)(2 * rows * panels_at_once(*gate, *up) * PANEL));
    size_t a = scratch_bytes(gate, 1), b = scratch_bytes(up, 1);
    return products + (a > b ? a : b);
}

}  // namespace gemcutter

// Both entries return 0, or 1 if memory for intermediate activations ran out.

// out [rows, sum of the parts' rows] = x [rows, columns] times the parts, which have one order of columns.
GC_EXPORT int gc_linear(const gc_matrix *parts, int num_parts, const float *x, int64_t rows, int activations, float *out) {
    using namespace gemcutter;
    return in_arena([&](Arena &arena) {
        int64_t ld = 0;
        for (int i = 0; i < num_parts; ++i) ld += parts[i].rows;
        ConvertedRows converted = allocate_rows(arena, formats_of(parts, num_parts, rows, activations), rows, parts->columns,
                                                activations, parts->order);
        size_t bytes = scratch_bytes(parts, num_parts);
        char *scratch = arena.array<char>((int64_t)bytes * threads());
        parallel_region([&](ThreadPool &pool, int index) {
            convert_rows(pool, index, converted, x);
            pool.barrier();
            parallel_gemm(pool, index, parts, num_parts, converted.rows, out, ld, scratch + bytes * (size_t)index, 0);
        });
    });
}

// out [count, columns] = the rows of a matrix that ids name.
GC_EXPORT int gc_gather(const gc_matrix *matrix, const int64_t *ids, int64_t count, float *out) {
    using namespace gemcutter;
    parallel_region([&](ThreadPool &pool, int index) {
        Range own = share(count, 1, index, pool.size);
        for (int64_t i = own.first; i < own.last; ++i) matmul_kernels(*matrix).gather(matrix, ids[i], out + i * matrix->columns);
    });
    return 0;
}
