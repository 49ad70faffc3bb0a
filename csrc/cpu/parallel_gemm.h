// Products of activation rows with whole matrices, parallel over the thread pool: what layer ops are built from.
//
// Owns the conversion of activations (float32, int8, bfloat16) and the sharing of panels among threads, and the arena for
// intermediate memory. Functions that take a ThreadPool are called by every thread of the pool with the same arguments, inside a
// parallel region; each comment says whether it ends with a barrier.
#pragma once
#include "adapters.h"
#include "kernels.h"
#include "thread_pool.h"

namespace gemcutter {

// Memory of one parallel region, in 64-byte aligned allocations, reused by the next: allocate() before the region starts, on the
// calling thread.
class Arena {
  public:
    void *allocate(size_t bytes);
    template <typename T>
    T *array(int64_t count) {
        return static_cast<T *>(allocate(sizeof(T) * (size_t)count));
    }
    void clear();  // frees all allocations; keeps the memory for the next ones
    ~Arena();

    struct Chunk;
    struct Mark {
        Chunk *chunk;
        size_t used;
    };
    Mark mark() const;
    void rewind(const Mark &mark);  // frees what was allocated since, for ops that never run at the same time

  private:
    Chunk *chunks_ = nullptr;
};

Arena &thread_arena();  // one for each calling thread, as large as its largest call needs

// Activations in the formats that a product reads; allocated before the region.
struct ConvertedRows {
    int formats;
    const int32_t *order;  // of the matrix that reads them, as in gc_matrix
    float *gathered;       // [count, columns] in that order; null where there is none
    Rows rows;             // points to arena memory, which convert_rows fills
};

// Formats that any of these matrices reads for `count` rows.
int formats_of(const gc_matrix *parts, int num_parts, int64_t count, int activations);

// Allocates [count, columns] rows in `formats` (from formats_of). FORMAT_FLOAT needs memory only if rows are rounded to bfloat16:
// otherwise convert_rows sets rows.x to x itself.
ConvertedRows allocate_rows(Arena &arena, int formats, int64_t count, int64_t columns, int activations,
                            const int32_t *order = nullptr);

// Converts x_row to all formats of row `row`. Rows are independent: share them among threads in any way, then barrier().
void convert_row(ConvertedRows &converted, int64_t row, const float *x_row);

// Copies all formats of a row that both have.
void copy_row(const Rows &from, int64_t row, Rows &to, int64_t place);

// convert_row for all rows x [count, columns], shared among threads; no barrier at the end.
void convert_rows(ThreadPool &pool, int index, ConvertedRows &converted, const float *x);

// Neighbouring panels of both matrices that share the work on rows, where there are many; their groups.
int64_t panels_of(const gc_matrix &m);
int64_t panels_at_once(const gc_matrix &a, const gc_matrix &b);
int64_t groups_of(const gc_matrix &m, int64_t at_once);
struct Panels {
    int64_t first, count, width;  // width: rows of the matrix
};
Panels panels_of_group(const gc_matrix &m, int64_t group, int64_t at_once);

// out[m * ld + r] = rows times the matrices stacked by rows; no barrier at the end. `scratch` is this thread's own, of
// scratch_bytes(). `counter` is the index of a pool counter that nothing else in this region uses. `changes` are what adapters
// add to these products, or none.
void parallel_gemm(ThreadPool &pool, int index, const gc_matrix *parts, int num_parts, const Rows &rows, float *out, int64_t ld,
                   void *scratch, int counter, const LowRank &changes = {});

// Where gated rows of `columns` go: to float32, or, where nobody reads that, right to tiles (kernels.h).
struct GatedRows {
    int64_t columns;
    float *x;
    uint16_t *tiles;
};

// Rows first..last-1 of the next product for some panels.
void geglu_panels(const gc_matrix &gate, const gc_matrix &up, const Panels &panels, const Rows &rows, int64_t first, int64_t last,
                  const GatedRows &out, void *scratch, const LowRank &changes = {});

// out [rows, columns] = gelu_tanh(gate row f) * (up row f) in column f, with matrices [gate parts..., up parts...] given as two
// stacks of equally many rows; no barrier at the end. The two products are never stored as a whole.
void parallel_geglu(ThreadPool &pool, int index, const gc_matrix *gate, const gc_matrix *up, const Rows &rows,
                    const GatedRows &out, void *scratch, int counter, const LowRank &changes = {});

// Prefetches the weights that this thread reads first in a product of `count` rows; does nothing where there are many rows.
void prefetch_weights(const ThreadPool &pool, int index, const gc_matrix *parts, int num_parts, int64_t count);

size_t scratch_bytes(const gc_matrix *parts, int num_parts);                           // for parallel_gemm
int64_t most_chunk_rows(const gc_matrix &m, int64_t rows);                             // that parallel_geglu multiplies at a time
size_t geglu_scratch_bytes(const gc_matrix *gate, const gc_matrix *up, int64_t rows);  // for `rows` rows at a time

}  // namespace gemcutter
