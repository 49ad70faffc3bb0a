// Repacking: from the quantized rows of a file to panels of 16 rows, at memory bandwidth.
//
// Owns the source formats that are common enough for a loop of their own; the others are repacked, more slowly, in Python
// (gemcutter/quant/cpu_packing.py), which is also the definition that this file is tested against. Every row of a block writes 4 codes
// at a stride of 64 bytes, so a block stays in the L1 cache until all of its 16 rows are written. Read `layout.h` for the
// target.
#include <string.h>

#include <initializer_list>

#include "repack.h"
#include "thread_pool.h"

namespace gemcutter {
namespace {

constexpr uint32_t LOW = 0x0f0f0f0f, HIGH = 0xf0f0f0f0;

inline uint32_t load_u32(const uint8_t *p) {
    uint32_t value;
    memcpy(&value, p, 4);
    return value;
}

inline void store_u32(uint8_t *vectors, int j, int row, uint32_t value) { memcpy(vectors + j * 64 + row * 4, &value, 4); }

inline void store_u16(uint8_t *heads, int row, const uint8_t *value) { memcpy(heads + row * 2, value, 2); }

// Each of these writes one row of a unit: `source` is its first byte, `out` the unit's first byte in the panel.

void q4_0(const uint8_t *source, uint8_t *out, int row) {
    store_u16(out, row, source);
    for (int j = 0; j < 4; ++j) store_u32(out + 32, j, row, load_u32(source + 2 + 4 * j));  // pairs nibbles as panels do
}

// 2^(e - 128) as bfloat16, of which the two smallest are subnormal; nibbles as in q4_0.
void mxfp4(const uint8_t *source, uint8_t *out, int row) {
    const uint16_t scale = source[0] < 2 ? (uint16_t)(0x20 << source[0]) : (uint16_t)((source[0] - 1) << 7);
    memcpy(out + row * 2, &scale, 2);
    for (int j = 0; j < 4; ++j) store_u32(out + 32, j, row, load_u32(source + 1 + 4 * j));
}

void q8_0(const uint8_t *source, uint8_t *out, int row) {
    store_u16(out, row, source);
    for (int j = 0; j < 8; ++j) store_u32(out + 32, j, row, load_u32(source + 2 + 4 * j));
}

// The low nibbles of 32 bytes as one block, or the high ones.
void nibbles(const uint8_t *source, bool high, uint8_t *out, int row) {
    for (int j = 0; j < 4; ++j) {
        uint32_t near = load_u32(source + 4 * j), far = load_u32(source + 16 + 4 * j);
        store_u32(out, j, row, high ? (near >> 4 & LOW) | (far & HIGH) : (near & LOW) | (far & LOW) << 4);
    }
}

// Upper bits of 32 columns: `mask` of each byte, `shift` bits up.
void upper_bits(const uint8_t *source, int shift, uint32_t mask, uint8_t *out, int row) {
    for (int h = 0; h < 2; ++h) {
        uint32_t bits = 0;
        for (int k = 0; k < 4; ++k) bits |= (load_u32(source + 16 * h + 4 * k) >> shift & mask) << 2 * k;
        store_u32(out, h, row, bits);
    }
}

// The 6-bit scale and minimum of run 0..7, of 12 bytes.
inline uint8_t six_bit_scale(const uint8_t *p, int run) {
    return run < 4 ? p[run] & 63 : (p[run + 4] & 15) | (p[run - 4] >> 6) << 4;
}
inline uint8_t six_bit_minimum(const uint8_t *p, int run) {
    return run < 4 ? p[run + 4] & 63 : p[run + 4] >> 4 | (p[run] >> 6) << 4;
}

// d, dmin, scales and minima [12], then fifth bits [32] iff `fifth`, nibbles [128].
template <bool fifth>
void q45_k(const uint8_t *source, uint8_t *out, int row) {
    const uint8_t *scales = source + 4, *codes = source + (fifth ? 48 : 16);
    store_u16(out, row, source);
    store_u16(out + 32, row, source + 2);
    out += 64;
    for (int run = 0; run < 8; ++run, out += 32 + (fifth ? 384 : 256)) {
        out[row] = six_bit_scale(scales, run);
        out[16 + row] = six_bit_minimum(scales, run);
        nibbles(codes + run / 2 * 32, run & 1, out + 32, row);
        if (fifth) upper_bits(source + 16, run, 0x01010101, out + 32 + 256, row);
    }
}

// Nibbles [128], upper two bits [64], signed scales [16], d.
void q6_k(const uint8_t *source, uint8_t *out, int row) {
    store_u16(out, row, source + 208);
    out += 32;
    for (int run = 0; run < 8; ++run, out += 32 + 384) {
        int half = run / 4, quarter = run % 4;
        out[row] = source[192 + 2 * run];
        out[16 + row] = source[192 + 2 * run + 1];
        nibbles(source + half * 64 + quarter % 2 * 32, quarter / 2, out + 32, row);
        upper_bits(source + 128 + half * 32, 2 * quarter, 0x03030303, out + 32 + 256, row);
    }
}

// d, upper bits of the scales of 8 runs [2], their nibbles [4], codes [128]; a scale serves both halves of its run.
void iq4_xs(const uint8_t *source, uint8_t *out, int row) {
    store_u16(out, row, source);
    out += 32;
    for (int run = 0; run < 8; ++run, out += 32 + 256) {
        const int low = source[4 + run / 2] >> run % 2 * 4 & 15, high = source[2 + run / 4] >> run % 4 * 2 & 3;
        out[row] = out[16 + row] = (uint8_t)((low | high << 4) - 32);
        for (int j = 0; j < 4; ++j) store_u32(out + 32, j, row, load_u32(source + 8 + 16 * run + 4 * j));
    }
}

typedef uint8_t Bytes __attribute__((vector_size(16)));

// One row of a code block from a stream of 4 bits, lowest first, or of bytes.
void stream4(const uint8_t *source, uint32_t, uint8_t *out, int row) {
    Bytes both, even, odd;
    memcpy(&both, source, 16);
    even = both & 15, odd = both >> 4;
    Bytes near = __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    Bytes far = __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    near |= far << 4;
    for (int j = 0; j < 4; ++j) memcpy(out + j * 64 + row * 4, reinterpret_cast<const uint8_t *>(&near) + 4 * j, 4);
}

void stream8(const uint8_t *source, uint32_t flip, uint8_t *out, int row) {
    for (int j = 0; j < 8; ++j) store_u32(out, j, row, load_u32(source + 4 * j) ^ flip);
}

struct Work {
    const gc_source *source;
    const gc_matrix *target;
    int64_t units;  // of a panel
    void (*panel)(const Work &, int64_t index);
};

struct Rows {
    uint8_t *out;          // the panel
    int64_t first, count;  // its rows
};

Rows rows_of(const Work &work, int64_t index, int64_t bytes) {
    const gc_matrix &target = *work.target;
    auto *out = static_cast<uint8_t *>(const_cast<void *>(target.data)) + index * target.stride;
    int64_t first = index * PANEL, count = target.rows - first < PANEL ? target.rows - first : PANEL;
    if (count < PANEL) memset(out, 0, bytes);
    return {out, first, count};
}

template <int block_bytes, int unit_bytes, void (*write)(const uint8_t *, uint8_t *, int)>
void panel_of_blocks(const Work &work, int64_t index) {
    Rows rows = rows_of(work, index, work.units * unit_bytes);
    auto *codes = static_cast<const uint8_t *>(work.source->codes) + rows.first * work.source->code_stride;
    for (int64_t unit = 0; unit < work.units; ++unit)
        for (int row = 0; row < rows.count; ++row)
            write(codes + row * work.source->code_stride + unit * block_bytes, rows.out + unit * unit_bytes, row);
}

// Scales, and biases if there are any, then the group's codes, `bytes` of a row for each block.
template <int bytes, void (*write)(const uint8_t *, uint32_t, uint8_t *, int)>
void panel_of_streams(const Work &work, int64_t index) {
    const gc_source &source = *work.source;
    const gc_matrix &target = *work.target;
    int64_t size = scale_bytes(target.scales), blocks = target.group / BLOCK;
    int64_t unit_bytes = panel_bytes(target.codes, target.scales, target.group, target.has_bias, target.group);
    Rows rows = rows_of(work, index, work.units * unit_bytes);
    uint32_t flip = (uint32_t)source.flip * 0x01010101;
    for (int64_t unit = 0; unit < work.units; ++unit) {
        uint8_t *out = rows.out + unit * unit_bytes;
        for (const void *numbers : {source.scales, target.has_bias ? source.biases : nullptr}) {
            if (!numbers) continue;
            auto *from = static_cast<const uint8_t *>(numbers) + rows.first * source.scale_stride + unit * size;
            for (int row = 0; row < rows.count; ++row) memcpy(out + row * size, from + row * source.scale_stride, size);
            out += PANEL * size;
        }
        auto *codes = static_cast<const uint8_t *>(source.codes) + rows.first * source.code_stride + unit * blocks * bytes;
        for (int64_t block = 0; block < blocks; ++block, codes += bytes, out += code_block_bytes(target.codes))
            for (int row = 0; row < rows.count; ++row) write(codes + row * source.code_stride, flip, out, row);
    }
}

struct Kind {
    int columns;  // of a unit; 0: a group
    void (*panel)(const Work &, int64_t index);
};
const Kind KINDS[] = {
    {32, panel_of_blocks<18, 32 + 256, q4_0>},
    {32, panel_of_blocks<34, 32 + 512, q8_0>},
    {256, panel_of_blocks<144, 64 + 8 * (32 + 256), q45_k<false>>},
    {256, panel_of_blocks<176, 64 + 8 * (32 + 384), q45_k<true>>},
    {256, panel_of_blocks<210, 32 + 8 * (32 + 384), q6_k>},
    {0, panel_of_streams<16, stream4>},
    {0, panel_of_streams<32, stream8>},
    {32, panel_of_blocks<17, 32 + 256, mxfp4>},
    {256, panel_of_blocks<136, 32 + 8 * (32 + 256), iq4_xs>},
};

Work work_of(const gc_source &source, const gc_matrix &target) {
    const Kind &kind = KINDS[source.kind];
    return {&source, &target, target.columns / (kind.columns ? kind.columns : target.group), kind.panel};
}

constexpr int64_t SHARE = 4;  // panels that a thread takes at a time

void repack(void *argument, ThreadPool &pool, int) {
    const Work &work = *static_cast<const Work *>(argument);
    int64_t panels = (work.target->rows + PANEL - 1) / PANEL;
    for (;;) {
        int64_t first = pool.counters[0].fetch_add(SHARE, std::memory_order_relaxed);
        if (first >= panels) return;
        for (int64_t index = first; index < first + SHARE && index < panels; ++index) work.panel(work, index);
    }
}

}  // namespace

void repack_row(const gc_source &source, int64_t row, const gc_matrix &target) {
    gc_source own = source;
    own.codes = static_cast<const char *>(source.codes) + row * source.code_stride;
    if (source.scales) own.scales = static_cast<const char *>(source.scales) + row * source.scale_stride;
    if (source.biases) own.biases = static_cast<const char *>(source.biases) + row * source.scale_stride;
    const Work work = work_of(own, target);
    work.panel(work, 0);
}

}  // namespace gemcutter

// Writes rows of a file as the panels that `target` describes, whose memory is written to; returns 1 for an unknown kind.
GC_EXPORT int gc_repack(const gc_source *source, const gc_matrix *target) {
    using namespace gemcutter;
    if (source->kind < 0 || source->kind > GC_IQ4_XS) return 1;
    Work work = work_of(*source, *target);
    gemcutter::run_parallel(repack, &work);
    return 0;
}
