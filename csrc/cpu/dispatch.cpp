// Selects the processor level: the best one at first use, or the one that gc_set_level names.
//
// Owns the table of levels and the checks of what the processor has; refuses to know what kernels compute. Read `kernels.h` for
// what a level has.
#include <string.h>

#include <atomic>

#include "kernels.h"
#include "thread_pool.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gemcutter {
namespace {

const Kernels LEVELS[] = {
    {"portable", &vector_ops_portable, &packed_portable, &dense_portable, &attention_portable, nullptr, peaks_portable,
     add_low_rank_portable},
#if defined(__x86_64__)
    {"avx2", &vector_ops_avx2, &packed_avx2, &dense_avx2, &attention_avx2, nullptr, peaks_avx2, add_low_rank_avx2},
    {"avx_vnni", &vector_ops_avx2, &packed_avx_vnni, &dense_avx2, &attention_avx2, nullptr, peaks_avx_vnni, add_low_rank_avx2},
    {"avx512", &vector_ops_avx512, &packed_avx512, &dense_avx512, &attention_avx512, nullptr, peaks_avx512, add_low_rank_avx512},
    {"avx512_bf16", &vector_ops_avx512, &packed_avx512, &dense_avx512_bf16, &attention_avx512_bf16, &pair_attention_avx512_bf16,
     peaks_avx512_bf16, add_low_rank_avx512},
    {"amx", &vector_ops_avx512, &packed_amx, &dense_amx, &attention_amx, &pair_attention_avx512_bf16, peaks_amx,
     add_low_rank_avx512, pair_rows_amx},
#elif defined(__aarch64__)
    {"neon", &vector_ops_neon, &packed_neon, &dense_neon, &attention_neon, nullptr, peaks_neon, add_low_rank_neon},
    {"neon_i8mm", &vector_ops_neon, &packed_neon_i8mm, &dense_neon_i8mm, &attention_neon, nullptr, peaks_neon_i8mm,
     add_low_rank_neon},
#endif
};
constexpr int COUNT = sizeof LEVELS / sizeof *LEVELS;

#if defined(__x86_64__)
uint64_t xcr0() {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

bool may_use_tiles() {
#if defined(__linux__)
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return false;
#endif
}

// Levels by their place in the table, as bits; CPU model names are ignored, since virtual machines mask them.
enum Level { PORTABLE = 1, AVX2 = 2, AVX_VNNI = 4, AVX512 = 8, AVX512_BF16 = 16, AMX = 32 };

int supported_levels() {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return PORTABLE;
    bool has_xsave = c >> 27 & 1, has_avx = c >> 28 & 1, has_fma = c >> 12 & 1, has_f16c = c >> 29 & 1;
    if (!has_xsave || (xcr0() & 6) != 6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return PORTABLE;
    if (!(has_avx && has_fma && has_f16c && (b >> 5 & 1) && (b >> 8 & 1))) return PORTABLE;            // AVX2, BMI2
    bool has_512 = (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1) && (c >> 11 & 1);  // F DQ BW VL VNNI
    has_512 = has_512 && (xcr0() & 0xe6) == 0xe6;
    bool has_tiles = (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1) && (xcr0() >> 17 & 3) == 3;  // BF16, TILE, INT8
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) a = 0;
    int levels = PORTABLE | AVX2;
    if (a >> 4 & 1) levels |= AVX_VNNI;
    if (has_512) levels |= AVX512;
    if (has_512 && (a >> 5 & 1)) levels |= AVX512_BF16;
    if (levels & AVX512_BF16 && has_tiles && may_use_tiles()) levels |= AMX;
    return levels;
}
#elif defined(__aarch64__)
// What processor and system offer beyond ARMv8.0; older headers lack the names of Linux' bits.
struct Features {
    bool has_dot, has_i8mm, has_bf16;
};

#if defined(__APPLE__)
bool has(const char *name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
}
Features features() {
    return {has("hw.optional.arm.FEAT_DotProd"), has("hw.optional.arm.FEAT_I8MM"), has("hw.optional.arm.FEAT_BF16")};
}
#elif defined(__linux__)
Features features() {
    constexpr int DOT = 20, I8MM = 13, BF16 = 14;
    const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
    return {(first >> DOT & 1) != 0, (second >> I8MM & 1) != 0, (second >> BF16 & 1) != 0};
}
#else
Features features() { return {}; }
#endif

// Levels by their place in the table, as bits.
enum Level { PORTABLE = 1, NEON = 2, NEON_I8MM = 4 };

int supported_levels() {
    const Features found = features();
    if (!found.has_dot) return PORTABLE;
    return PORTABLE | NEON | (found.has_i8mm && found.has_bf16 ? NEON_I8MM : 0);
}
#else
int supported_levels() { return 1; }
#endif

int best_level() {
    int levels = supported_levels(), best = 0;
    while (levels >>= 1) ++best;
    return best;
}

bool is_supported(int level) {
#if defined(GC_EMULATE)
    return level == 0 || best_level() > 0;  // levels above AVX2 are emulated
#else
    return supported_levels() >> level & 1;
#endif
}

std::atomic<const Kernels *> chosen{nullptr};

}  // namespace

const Kernels &kernels() {
    const Kernels *found = chosen.load(std::memory_order_acquire);
    if (!found) {
        found = &LEVELS[best_level()];
        chosen.store(found, std::memory_order_release);
    }
    return *found;
}

}  // namespace gemcutter

// Uses the named level; 0 if this processor has it, 1 if not, 2 if there is no such level. Null chooses the best.
GC_EXPORT int gc_set_level(const char *name) {
    using namespace gemcutter;
    if (!name) return chosen.store(&LEVELS[best_level()]), 0;
    for (int index = 0; index < COUNT; ++index)
        if (!strcmp(LEVELS[index].name, name)) {
            if (!is_supported(index)) return 1;
            return chosen.store(&LEVELS[index]), 0;
        }
    return 2;
}

GC_EXPORT const char *gc_level() { return gemcutter::kernels().name; }
GC_EXPORT void gc_set_threads(int count) { gemcutter::set_threads(count); }
GC_EXPORT int gc_threads() { return gemcutter::threads(); }
GC_EXPORT int gc_version() { return 11; }  // of this interface; Python refuses another
