// See adapters.h.
#include "adapters.h"

#include <algorithm>

#include "parallel_gemm.h"

namespace gemcutter {
namespace {

// Of one piece of the work in `reduce`. Kernels take few rows in one way only, so that how rows are cut does not change them.
constexpr int64_t UNIT_RANKS = 4, UNIT_ROWS = FEW_ROWS;

struct Deltas {
    const gc_delta *first, *last;
};

Deltas deltas_of(const gc_matrix &matrix, int32_t adapter) {
    const gc_delta *end = matrix.deltas + matrix.num_deltas;
    const gc_delta *first = std::lower_bound(matrix.deltas, end, adapter,
                                             [](const gc_delta &delta, int32_t wanted) { return delta.adapter < wanted; });
    const gc_delta *last = first;
    while (last < end && last->adapter == adapter) ++last;
    return {first, last};
}

// low [rows, ranks first_rank and on] = rows of x times those of the down factor.
void reduce_unit(const gc_delta &delta, int64_t first_rank, const float *x, int64_t rows, float *low, int64_t stride) {
    gc_matrix some = delta.down;
    some.data = static_cast<const char *>(some.data) + first_rank * some.stride;
    some.rows = std::min(UNIT_RANKS, some.rows - first_rank);
    Rows all = {};
    all.count = rows, all.columns = some.columns, all.activations = GC_FLOAT_ROWS, all.x = x;
    matmul_kernels(some).gemm_panels(&some, 0, 1, &all, 0, rows, low + first_rank, stride, nullptr, nullptr);
}

}  // namespace

AdapterRuns::AdapterRuns(Arena &arena, const int32_t *adapters, int64_t rows) : rows_(rows) {
    if (!adapters) return;
    runs_ = arena.array<Run>(rows);
    for (int64_t row = 0; row < rows; ++row) {
        if (adapters[row] < 0) continue;
        Run *before = count_ ? runs_ + count_ - 1 : nullptr;
        if (before && before->last == row && before->adapter == adapters[row]) ++before->last;
        else runs_[count_++] = {row, row + 1, adapters[row]};
    }
}

AdapterRuns::AdapterRuns(Arena &arena, int32_t adapter, int64_t rows) : runs_(arena.array<Run>(1)), count_(1), rows_(rows) {
    *runs_ = {0, rows, adapter};
}

const AdapterRuns::Run *AdapterRuns::after(int64_t row) const {
    return std::upper_bound(begin(), end(), row, [](int64_t at, const Run &run) { return at < run.last; });
}

// Calls visit(part, delta, where its results begin in a row of low_) for what a run's adapter adds.
template <typename Visit>
void LowRank::each_delta(const AdapterRuns::Run &run, Visit visit) const {
    int64_t offset = 0;
    for (int part = 0; part < num_parts_; ++part) {
        const Deltas deltas = deltas_of(*parts_[part], run.adapter);
        for (const gc_delta *delta = deltas.first; delta < deltas.last; offset += delta++->down.rows) visit(part, *delta, offset);
    }
}

void LowRank::allocate(Arena &arena, const AdapterRuns &runs, std::initializer_list<const gc_matrix *> parts) {
    runs_ = &runs;
    for (const gc_matrix *part : parts) parts_[num_parts_++] = part;
    for (const AdapterRuns::Run &run : runs)
        each_delta(run,
                   [&](int, const gc_delta &delta, int64_t offset) { stride_ = std::max(stride_, offset + delta.down.rows); });
    if (stride_) low_ = arena.array<float>(runs.rows() * stride_);
}

bool LowRank::reduce(ThreadPool &pool, int index, const float *x) const {
    if (!stride_) return false;
    auto across = [](const gc_delta &delta) { return (delta.down.rows + UNIT_RANKS - 1) / UNIT_RANKS; };
    auto units = [&](const AdapterRuns::Run &run, const gc_delta &delta) {
        return across(delta) * ((run.last - run.first + UNIT_ROWS - 1) / UNIT_ROWS);
    };
    int64_t all = 0, before = 0;
    for (const AdapterRuns::Run &run : *runs_)
        each_delta(run, [&](int, const gc_delta &delta, int64_t) { all += units(run, delta); });
    const Range own = share(all, 1, index, pool.size);
    for (const AdapterRuns::Run &run : *runs_)
        each_delta(run, [&](int, const gc_delta &delta, int64_t offset) {
            const int64_t count = units(run, delta), last = std::min(own.last - before, count);
            for (int64_t unit = std::max<int64_t>(own.first - before, 0); unit < last; ++unit) {
                const int64_t row = run.first + unit / across(delta) * UNIT_ROWS, rows = std::min(UNIT_ROWS, run.last - row);
                reduce_unit(delta, unit % across(delta) * UNIT_RANKS, x + row * delta.down.columns, rows,
                            low_ + row * stride_ + offset, stride_);
            }
            before += count;
        });
    return true;
}

void LowRank::add_runs(int64_t part, int64_t panel, int64_t panels, int64_t first, int64_t last, float *out, int64_t ld) const {
    for (const AdapterRuns::Run *run = runs_->after(first); run < runs_->end() && run->first < last; ++run) {
        const int64_t row = std::max(run->first, first), rows = std::min(run->last, last) - row;
        each_delta(*run, [&](int of, const gc_delta &delta, int64_t offset) {
            if (of != part) return;
            const int64_t start = delta.start / PANEL,
                          end = std::min(panel + panels, (delta.start + delta.rows + PANEL - 1) / PANEL);
            const int64_t size = delta.down.rows * PANEL * (delta.up_codes == GC_BF16 ? sizeof(uint16_t) : sizeof(float));
            for (int64_t at = std::max(panel, start); at < end; ++at) {
                const int64_t width = std::min<int64_t>(PANEL, delta.start + delta.rows - at * PANEL);
                kernels().add_low_rank(static_cast<const char *>(delta.up) + (at - start) * size, delta.up_codes, delta.down.rows,
                                       low_ + row * stride_ + offset, stride_, rows, width,
                                       out + (row - first) * ld + (at - panel) * PANEL, ld);
            }
        });
    }
}

}  // namespace gemcutter
