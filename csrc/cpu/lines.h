// The lines of a layer as pieces of a region: project, attend, mix, feed, inject.
//
// A line is made before the region (it takes its memory then) and run by every thread of the team inside it, so that any number
// of lines share one region. Between lines a row belongs to the thread that `own_rows` names: a line begins with its own rows
// complete and leaves them complete, and needs no barrier at either end, unless it says so. Shape letters: N rows, M kept rows, D
// hidden, H heads, K key heads, E head dim, F mlp width, P per-layer-embedding dim. Read `sentences.cpp` for the lines and the
// entry points, `experts.cpp` for the mixture of experts, `ops/reference.py` for what each line means.
#pragma once
#include <optional>

#include "attend.h"

namespace gemcutter {

// Numbers of the team counters within one region; a layer uses each once.
enum Counter { COUNT_KV, COUNT_Q, COUNT_ATTEND, COUNT_OUT, COUNT_GATED, COUNT_DOWN, COUNT_PLE_GATE, COUNT_PLE_OUT, COUNT_ROUTER,
               COUNT_EXPERTS_IN, COUNT_EXPERTS_OUT };

inline Range own_rows(int64_t count, int index, int size) { return share(count, 1, index, size); }

// Memory of which every thread has a piece.
struct Scratch {
    char *memory = nullptr;
    size_t stride = 0;
    void take(Arena &arena, size_t bytes);
    void *of(int index) const { return memory + (size_t)index * stride; }
};

// Rows on their way into a product: kept in float32 and in the forms that the matrices want.
struct Entering {
    float *x = nullptr;
    RowForms forms;
    void take(Arena &arena, const gc_matrix *parts, int num_parts, int64_t count, int64_t columns, int activations);
    void take(Arena &arena, int wanted, int64_t count, int64_t columns, int activations);
    float *row(int64_t m) { return x + m * forms.rows.columns; }
    void finish(int64_t m) { make_form(forms, m, row(m)); }  // once row(m) is filled
};

class Project {
  public:
    // `keep` lists the rows whose queries are wanted; null wants all.
    Project(Arena &arena, const gc_layer &layer, const gc_step &step, const int64_t *keep, int64_t kept);
    // q [M, H, E], complete after the next barrier.
    void run(Team &team, int index, const float *x, float *q);

  private:
    void finish_query(int64_t m, int64_t head, float *q) const;
    void write_keys(int64_t n, int64_t head, float *spare) const;

    const gc_layer &layer_;
    const gc_step &step_;
    const int64_t *keep_;
    int64_t kept_, q_width_, kv_width_;  // kv_width_: of keys and values as projected, 0 in a layer that reads
    int num_kv_;
    Entering all_, wanted_;  // `wanted_` only where some rows are not kept
    float *kv_, *raw_q_;     // as projected; in one matrix [N, q + kv] where all rows are kept
    int64_t kv_stride_, q_stride_;
    Scratch scratch_, spare_;
};

class Mix {
  public:
    Mix(Arena &arena, const gc_layer &layer, int64_t rows);
    // out = x + norm(o times the out-projection); x row keep[m] where keep is given. Begins with o complete for all threads.
    void run(Team &team, int index, const float *x, const int64_t *keep, const float *o, float *out);

  private:
    const gc_layer &layer_;
    int64_t rows_;
    RowForms forms_;
    float *product_;
    Scratch scratch_;
};

class Experts {
  public:
    Experts(Arena &arena, const gc_layer &layer, int64_t rows);
    // Choose the experts of all rows x [N, D] and gather the rows of each; ends with a barrier.
    void route(Team &team, int index, const float *x);
    // The chosen experts' products; ends with a barrier.
    void run(Team &team, int index);
    // out [D] = the sum of one row's experts, in ascending order of experts.
    void sum(int64_t row, float *out) const;

  private:
    struct Group {  // the rows of one expert: pairs first to first + count - 1
        int64_t expert, first, count;
    };
    void choose(int64_t row);
    void group();
    Rows rows_of(const Rows &all, const Group &group) const;
    int forms_at_any_count(const gc_matrix *parts, int num_parts) const;
    template <typename Item>
    void share_panels(Team &team, int counter, int64_t panels, Item item) const;

    const gc_layer &layer_;
    const gc_experts &experts_;
    int64_t rows_, num_groups_ = 0;
    Entering routed_, gated_;
    float *normed_;      // [N, D]
    RowForms entering_;  // of the pairs (row, expert), those of one expert together; of the only row where there is one
    float *gathered_ = nullptr;
    float *chances_, *weights_, *product_;  // [N, X], [N, top_k], [pairs, D]
    int64_t *chosen_, *places_;  // [N, top_k]: a row's experts in ascending order, and the pair of each
    int64_t *row_of_;            // [pairs]
    Group *groups_;
    Scratch scratch_;
};

class Feed {
  public:
    Feed(Arena &arena, const gc_layer &layer, int64_t rows);
    // out = (x + the feed-forward of x) * scale; out may be x.
    void run(Team &team, int index, const float *x, float *out, float scale);

  private:
    void join(int64_t row, const float *x, float *out, float scale);

    const gc_layer &layer_;
    int64_t rows_;
    Entering normed_, gated_;
    float *product_;
    std::optional<Experts> experts_;
    Scratch scratch_;
};

class Inject {
  public:
    Inject(Arena &arena, const gc_layer &layer, int64_t rows);
    // out = (x + norm(gated per-layer embedding)) * scale, with ple rows `stride` elements apart; out may be x.
    void run(Team &team, int index, const float *x, const float *ple, int64_t stride, float *out, float scale);

  private:
    const gc_layer &layer_;
    int64_t rows_;
    Entering entering_, gated_;
    float *product_;
    Scratch scratch_;
};

}  // namespace gemcutter
