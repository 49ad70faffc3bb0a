// Products of rows with whole matrices, shared out over the team: what sentences are written in.
//
// Owns the forms of rows (float, int8, bfloat16) and the sharing of panels among threads. All functions here are called by every
// thread of the team with the same arguments, inside a region; each says whether it ends with a barrier.
#pragma once
#include "kernels.h"
#include "threads.h"

namespace gemcutter {

// Memory of one region, 64-byte aligned pieces, reused by the next: take() before the region starts, on the calling thread.
class Arena {
  public:
    void *take(size_t bytes);
    template <typename T>
    T *array(int64_t count) {
        return static_cast<T *>(take(sizeof(T) * (size_t)count));
    }
    void clear();  // what was taken is free again; the memory is kept
    ~Arena();

    struct Chunk;
    struct Mark {
        Chunk *chunk;
        size_t used;
    };
    Mark mark() const;
    void rewind(const Mark &mark);  // what was taken since then may be taken again, for lines that never run together

  private:
    Chunk *chunks_ = nullptr;
};

Arena &thread_arena();  // the calling thread's only one: what its largest call needs is enough for all

// Places for the forms that a product asks for; made before the region.
struct RowForms {
    int forms;
    Rows rows;  // pointers to arena memory, filled by make_forms
};

// Forms that any of these matrices wants of `count` rows.
int forms_of(const gc_matrix *parts, int num_parts, int64_t count, int activations);

// Take memory for the forms of [count, columns] rows; `forms` from forms_of. FORM_FLOAT takes memory only if rows are rounded:
// otherwise rows.x is set by make_forms to x itself.
RowForms take_forms(Arena &arena, int forms, int64_t count, int64_t columns, int activations);

// Fill the forms of row `row` from x_row. Rows are independent: share them out as you like, then barrier().
void make_form(RowForms &forms, int64_t row, const float *x_row);

// The same for all rows x [count, columns], shared out by rows; no barrier at the end.
void make_forms(Team &team, int index, RowForms &forms, const float *x);

// out[m * ld + r] = rows times the matrices stacked by rows; no barrier at the end. `scratch` is this thread's own, of
// scratch_bytes(). `counter` numbers a team counter that nobody else uses in this region.
void multiply(Team &team, int index, const gc_matrix *parts, int num_parts, const Rows &rows, float *out, int64_t ld,
              void *scratch, int counter);

// out[m * ld + f] = gelu_tanh(gate row f) * (up row f), with matrices [gate parts..., up parts...] given as two stacks of equally
// many rows; no barrier at the end. The products never exist as a whole.
void multiply_gated(Team &team, int index, const gc_matrix *gate, const gc_matrix *up, const Rows &rows, float *out, int64_t ld,
                    void *scratch, int counter);

// Ask for what this thread reads first in a product of `count` rows, while it waits for them; nothing where rows are many.
void warm(const Team &team, int index, const gc_matrix *parts, int num_parts, int64_t count);

size_t scratch_bytes(const gc_matrix *parts, int num_parts);        // for multiply
size_t gated_scratch_bytes(const gc_matrix *gate, const gc_matrix *up);  // for multiply_gated

}  // namespace gemcutter
