// What layers of vision and audio encoders share: rows that are clipped before products, and checks of a call's numbers.
//
// Owns one copy of the rows for all matrices that clip them alike, and what an adapter adds to their products: a tower's matrices
// carry the changes of one adapter at most, which all rows ask for. Refuses to know layers. Read `vision.cpp` and `audio.cpp`.
#pragma once
#include <string.h>

#include "layer_ops.h"

namespace gemcutter {

// The rows that several matrices read: one copy for all that clip alike.
class ClippedInputs {
  public:
    // `clips` is null where nothing is clipped.
    void allocate(Arena &arena, const gc_matrix *const *parts, const gc_clip *const *clips, int count, int64_t rows,
                  int activations) {
        for (int i = 0; i < count; ++i) {
            int same = 0;
            while (clips && !same_input(*clips[same], *clips[i])) ++same;
            of_[i] = same;
            if (same == i) clips_[i] = clips ? clips[i] : nullptr;
        }
        for (int i = 0; i < count; ++i) {
            if (of_[i] != i) continue;
            int formats = 0;
            for (int j = i; j < count; ++j)
                if (of_[j] == i) formats |= formats_of(parts[j], 1, rows, activations);
            buffers_[i].allocate(arena, formats, rows, parts[i]->columns, activations);
        }
        for (int i = 0; i < count; ++i) {
            if (!parts[i]->num_deltas) continue;
            runs_[i] = AdapterRuns(arena, parts[i]->deltas->adapter, rows);
            changes_[i].allocate(arena, runs_[i], {parts[i]});
        }
        count_ = count;
    }
    // Takes row m, clipped for each matrix. `from` may be row(m).
    void fill(int64_t m, const float *from) {
        int64_t columns = buffers_[0].converted.rows.columns;
        for (int i = count_ - 1; i >= 0; --i) {  // the first last, since `from` may be its memory
            if (of_[i] != i) continue;
            float *to = buffers_[i].row(m);
            if (clips_[i]) kernels().vector_ops->clamp(from, clips_[i]->input_min, clips_[i]->input_max, columns, to);
            else if (to != from) memcpy(to, from, sizeof(float) * (size_t)columns);
            buffers_[i].convert(m);
        }
    }
    float *row(int64_t m) { return buffers_[0].row(m); }
    float *data() { return buffers_[0].x; }
    const Rows &rows(int i) const { return buffers_[of_[i]].converted.rows; }
    const LowRank &changes(int i) const { return changes_[i]; }
    // A barrier, after which all rows are there; and what `changes` need, before another one.
    void complete(ThreadPool &pool, int index) const {
        pool.barrier();
        bool has_changes = false;
        for (int i = 0; i < count_; ++i) has_changes |= changes_[i].reduce(pool, index, buffers_[of_[i]].x);
        if (has_changes) pool.barrier();
    }

  private:
    static constexpr int MOST = 3;
    static bool same_input(const gc_clip &a, const gc_clip &b) {
        return a.input_min == b.input_min && a.input_max == b.input_max;
    }
    ActivationBuffer buffers_[MOST];
    AdapterRuns runs_[MOST];
    LowRank changes_[MOST];
    const gc_clip *clips_[MOST] = {};
    int of_[MOST] = {}, count_ = 0;
};

// The scratch that products with any of these matrices need, `bytes` at least.
inline size_t most_scratch(const gc_matrix *const *parts, int count, size_t bytes) {
    for (int i = 0; i < count; ++i) {
        size_t of_part = scratch_bytes(parts[i], 1);
        bytes = of_part > bytes ? of_part : bytes;
    }
    return bytes;
}

// Whether `edges` [count + 1] ascend from 0 to `rows`.
inline bool are_edges(const int64_t *edges, int64_t count, int64_t rows) {
    if (count < 1 || edges[0] != 0 || edges[count] != rows) return false;
    for (int64_t i = 0; i < count; ++i)
        if (edges[i + 1] < edges[i]) return false;
    return true;
}

inline bool is_run(int64_t first, int64_t last, int64_t rows) { return 0 <= first && first < last && last <= rows; }

}  // namespace gemcutter
