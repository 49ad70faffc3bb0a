// What adapters add to matrix products, for the rows of a step that ask for them: up times (down times the row), in float32.
//
// Such a product has a phase of its own before it, `reduce`, in which all threads share the small products with down factors;
// whoever finishes a tile of the product itself then adds the products with up factors while the tile is in the cache. A row's
// sums are made in one order, whatever rows are beside it, and rows that ask for nothing are not touched. Refuses to know layers.
// Read `ops/lora.py` for the definition, `parallel_gemm.h` for the products.
#pragma once
#include <initializer_list>

#include "kernels.h"
#include "thread_pool.h"

namespace gemcutter {

class Arena;

// The rows of a step by the adapter that they ask for, as runs of neighbours that ask for the same.
class AdapterRuns {
  public:
    struct Run {
        int64_t first, last;
        int32_t adapter;
    };
    AdapterRuns() = default;
    // `adapters` [rows] as in gc_step; null: no row asks for any.
    AdapterRuns(Arena &arena, const int32_t *adapters, int64_t rows);
    AdapterRuns(Arena &arena, int32_t adapter, int64_t rows);  // all rows ask for the same
    const Run *begin() const { return runs_; }
    const Run *end() const { return runs_ + count_; }
    const Run *after(int64_t row) const;  // the first run that ends behind a row
    int64_t rows() const { return rows_; }

  private:
    Run *runs_ = nullptr;
    int64_t count_ = 0, rows_ = 0;
};

// The changes of one product with some matrices, stacked by rows; without any, both methods do nothing.
class LowRank {
  public:
    // `parts` and `runs` outlive this; called before the region.
    void allocate(Arena &arena, const AdapterRuns &runs, std::initializer_list<const gc_matrix *> parts);
    // Multiplies rows x [N, columns] with down factors, shared among threads, no barrier at the end; returns whether there are any,
    // the same in all threads. `add` needs all of it complete.
    bool reduce(ThreadPool &pool, int index, const float *x) const;
    bool is_empty() const { return !stride_; }
    // Adds to a finished tile: rows first..last-1 and some panels of a part; `out` is of row `first` and the first panel.
    void add(int64_t part, int64_t panel, int64_t panels, int64_t first, int64_t last, float *out, int64_t ld) const {
        if (stride_) add_runs(part, panel, panels, first, last, out, ld);
    }

  private:
    template <typename Visit>
    void each_delta(const AdapterRuns::Run &run, Visit visit) const;
    void add_runs(int64_t part, int64_t panel, int64_t panels, int64_t first, int64_t last, float *out, int64_t ld) const;

    static constexpr int MOST_PARTS = 3;
    const AdapterRuns *runs_ = nullptr;
    const gc_matrix *parts_[MOST_PARTS] = {};
    int num_parts_ = 0;
    int64_t stride_ = 0;    // the ranks of all deltas that a row can get together; 0: there are none
    float *low_ = nullptr;  // [N, stride_] rows times down factors, one delta's after the other's
};

}  // namespace gemcutter
