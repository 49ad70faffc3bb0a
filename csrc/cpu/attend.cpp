// Cuts the attention of a step into items for the team, and merges what was cut along the keys.
//
// Owns no arithmetic but the merging of partial softmaxes; refuses to know vectors. Read `attend.h` for how the work is cut,
// `attention.cpp` for the kernels.
#include "attend.h"

#include <math.h>
#include <string.h>

#include "region.h"

namespace gemcutter {

// One key head of one sequence: a block of its rows with all their keys, or some keys of a single row.
struct AttendItem {
    int64_t sequence, kv_head, row, rows;
    int64_t first, last;  // positions of the keys, where `piece` is one
    int64_t piece;        // where the partial result goes; -1 for a block of rows
};

// The pieces that make one row of one key head; none where the row sees no key.
struct AttendMerge {
    int64_t row, kv_head, piece, pieces;
};

namespace {

constexpr int64_t FEW_ROWS = 8;     // of a sequence: up to here its rows go one by one, cut along the keys
constexpr int64_t MIN_PIECE = 128;  // keys: fewer would cost more to merge than they gain
constexpr int64_t MAX_PIECES = 32;  // of one row, as long as the kernel's limit on keys allows it
constexpr int64_t MIN_LINES = 48;   // rows times heads of a block that still pay for packing its keys

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t group_of(const gc_attention &layer) { return layer.heads / layer.kv_heads; }

// Walks over the cuts of a step: once to count them, and once more to note them.
struct Cutter {
    const gc_step &step;
    const gc_attention &layer;
    int64_t block;  // rows
    AttendItem *items;
    AttendMerge *merges;
    int64_t num_items = 0, num_merges = 0, num_pieces = 0;

    void cut() {
        for (int64_t s = 0; s < step.sequences; ++s)
            if (rows_of(s) > FEW_ROWS) cut_rows(s);
        for (int64_t s = 0; s < step.sequences; ++s)
            if (rows_of(s) <= FEW_ROWS)
                for (int64_t row = step.row_start[s]; row < step.row_start[s + 1]; ++row) cut_keys(s, row);
    }

    int64_t rows_of(int64_t s) const { return step.row_start[s + 1] - step.row_start[s]; }

    // The late rows have most keys and come first, so that no long item is left for the end.
    void cut_rows(int64_t s) {
        for (int64_t end = step.row_start[s + 1]; end > step.row_start[s];) {
            int64_t rows = least(block, end - step.row_start[s]);
            end -= rows;
            for (int64_t head = 0; head < layer.kv_heads; ++head) add({s, head, end, rows, 0, 0, -1});
        }
    }

    void cut_keys(int64_t s, int64_t row) {
        int64_t last = step.positions[row] + 1, first = step.span_start[s];
        if (layer.window) first = most(first, last - layer.window);
        int64_t size = most(MIN_PIECE, ceil_div(ceil_div(last - first, MAX_PIECES), 16) * 16);
        size = least(size, DECODE_KEYS);
        int64_t pieces = last > first ? ceil_div(last - first, size) : 0;
        for (int64_t head = 0; head < layer.kv_heads; ++head, ++num_merges)
            if (merges) merges[num_merges] = {row, head, num_pieces + head * pieces, pieces};
        for (int64_t i = 0; i < pieces; ++i)  // the heads of a slot are neighbours in memory, and so they are here
            for (int64_t head = 0; head < layer.kv_heads; ++head)
                add({s, head, row, 1, first + i * size, least(first + (i + 1) * size, last), num_pieces + head * pieces + i});
        num_pieces += layer.kv_heads * pieces;
    }

    void add(const AttendItem &item) {
        if (items) items[num_items] = item;
        ++num_items;
    }
};

// Rows of a block: what the kernel likes best, or fewer where that leaves threads without work.
int64_t block_rows(const gc_step &step, const gc_attention &layer) {
    int64_t group = group_of(layer), block = kernels().attention->prefill_rows(group, layer.head_dim);
    while (block / 2 * group >= MIN_LINES && ceil_div(step.rows, block) * layer.kv_heads < 3 * threads()) block /= 2;
    return block;
}

Keys keys_of(const AttendWork &work, const AttendItem &item) {
    const gc_attention &layer = work.layer;
    const gc_step &step = *work.step;
    int64_t offset = item.kv_head * layer.head_dim * (layer.dtype == GC_F32 ? 4 : 2), low = step.span_low[item.sequence];
    Keys keys = {};
    keys.k = static_cast<const char *>(layer.k) + offset;
    keys.v = static_cast<const char *>(layer.v) + offset;
    keys.stride = layer.kv_heads * layer.head_dim;
    keys.dtype = layer.dtype;
    keys.start = step.span_start[item.sequence];
    keys.low = low;
    keys.slots = low < 0 ? step.span_slots[item.sequence] : nullptr;
    return keys;
}

void do_item(const AttendWork &work, const AttendItem &item, const float *q, float *out, void *scratch) {
    const gc_attention &layer = work.layer;
    int64_t group = group_of(layer), dim = layer.head_dim, stride = layer.heads * dim;
    int64_t at = item.row * stride + item.kv_head * group * dim;
    Keys keys = keys_of(work, item);
    if (item.piece < 0)
        kernels().attention->prefill(q + at, out + at, stride, item.rows, group, dim, work.step->positions + item.row,
                                     layer.window, &keys, scratch);
    else
        kernels().attention->decode(q + at, dim, group, dim, &keys, item.first, item.last,
                                    work.partial + item.piece * group * dim, work.top + item.piece * group,
                                    work.total + item.piece * group, scratch);
}

// One head of a row from its pieces: each weighs exp(its maximum - the greatest).
void merge_head(const AttendWork &work, const AttendMerge &merge, int64_t head, float *out) {
    int64_t group = group_of(work.layer), dim = work.layer.head_dim;
    const float *top = work.top + merge.piece * group + head, *total = work.total + merge.piece * group + head;
    float best = -INFINITY, sum = 0;
    for (int64_t i = 0; i < merge.pieces; ++i) best = top[i * group] > best ? top[i * group] : best;
    for (int64_t i = 0; i < merge.pieces; ++i) sum += total[i * group] * expf(top[i * group] - best);
    memset(out, 0, sizeof(float) * (size_t)dim);
    for (int64_t i = 0; i < merge.pieces; ++i) {
        const float *part = work.partial + ((merge.piece + i) * group + head) * dim;
        kernels().words->add_scaled(part, expf(top[i * group] - best) / sum, dim, out);
    }
}

}  // namespace

AttendWork take_attend(Arena &arena, const gc_step &step, const gc_attention &layer) {
    int64_t group = group_of(layer);
    Cutter count = {step, layer, block_rows(step, layer), nullptr, nullptr};
    count.cut();
    AttendWork work = {};
    work.step = &step, work.layer = layer;
    work.num_items = count.num_items, work.num_merges = count.num_merges;
    work.items = arena.array<AttendItem>(count.num_items);
    work.merges = arena.array<AttendMerge>(count.num_merges);
    work.partial = arena.array<float>(count.num_pieces * group * layer.head_dim);
    work.top = arena.array<float>(count.num_pieces * group);
    work.total = arena.array<float>(count.num_pieces * group);
    work.scratch_stride = (kernels().attention->scratch_bytes(group, layer.head_dim) + 63) / 64 * 64;
    work.scratch = arena.array<char>((int64_t)work.scratch_stride * threads());
    Cutter note = {step, layer, count.block, work.items, work.merges};
    note.cut();
    return work;
}

void attend(Team &team, int index, const AttendWork &work, const float *q, float *out, int counter) {
    void *scratch = work.scratch + work.scratch_stride * (size_t)index;
    for (int64_t i; (i = team.counters[counter].fetch_add(1, std::memory_order_relaxed)) < work.num_items;)
        do_item(work, work.items[i], q, out, scratch);
    if (!work.num_merges) return;
    team.barrier();
    int64_t group = group_of(work.layer), dim = work.layer.head_dim;
    Range own = share(work.num_merges * group, 1, index, team.size);
    for (int64_t i = own.first; i < own.last; ++i) {
        const AttendMerge &merge = work.merges[i / group];
        merge_head(work, merge, i % group, out + (merge.row * work.layer.heads + merge.kv_head * group + i % group) * dim);
    }
}

}  // namespace gemcutter

// Attention of all rows of a step: out [N, H, E] from q [N, H, E], float32. Gives 0, or 1 if there is no memory.
GC_EXPORT int gc_attend(const float *q, const gc_step *step, const gc_attention *layer, float *out) {
    using namespace gemcutter;
    return in_arena([&](Arena &arena) {
        AttendWork work = take_attend(arena, *step, *layer);
        region([&](Team &team, int index) { attend(team, index, work, q, out, 0); });
    });
}
