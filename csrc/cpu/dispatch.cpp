// Selects the processor level: the best one at first use, or the one that gc_set_level names.
//
// Owns the table of levels and the checks of what the processor has; refuses to know what kernels compute. Read `kernels.h` for what a level has.
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
    {"portable", &vector_ops_portable, &packed_portable, &dense_portable, &attention_portable, nullptr, peaks_portable},
#if defined(__x86_64__)
    {"avx2", &vector_ops_avx2, &packed_avx2, &dense_avx2, &attention_avx2, nullptr, peaks_avx2},
    {"avx512", &vector_ops_avx512, &packed_avx512, &dense_avx512, &attention_avx512, nullptr, peaks_avx512},
    {"avx512_bf16", &vector_ops_avx512, &packed_avx512, &dense_avx512_bf16, &attention_avx512_bf16, &pair_attention_avx512_bf16,
     peaks_avx512_bf16},
    {"amx", &vector_ops_avx512, &packed_amx, &dense_amx, &attention_avx512_bf16, &pair_attention_avx512_bf16, peaks_amx},
#elif defined(__aarch64__)
    {"neon", &vector_ops_neon, &packed_neon, &dense_neon, &attention_neon, nullptr, peaks_neon},
    {"neon_i8mm", &vector_ops_neon, &packed_neon_i8mm, &dense_neon_i8mm, &attention_neon, nullptr, peaks_neon_i8mm},
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

// The highest level that processor and system allow; CPU model names are ignored, since virtual machines mask them.
int best_level() {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    bool has_xsave = c >> 27 & 1, has_avx = c >> 28 & 1, has_fma = c >> 12 & 1, has_f16c = c >> 29 & 1;
    if (!has_xsave || (xcr0() & 6) != 6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    if (!(has_avx && has_fma && has_f16c && (b >> 5 & 1) && (b >> 8 & 1))) return 0;                   // AVX2, BMI2
    bool has_512 = (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1) && (c >> 11 & 1);  // F DQ BW VL VNNI
    if (!has_512 || (xcr0() & 0xe6) != 0xe6) return 1;
    bool has_amx = (d >> 22 & 1) && (d >> 24 & 1) && (xcr0() >> 17 & 3) == 3;  // BF16, TILE
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return 2;   // AVX512_BF16
    return has_amx && may_use_tiles() ? 4 : 3;
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

int best_level() {
    const Features found = features();
    return !found.has_dot ? 0 : found.has_i8mm && found.has_bf16 ? 2 : 1;
}
#else
int best_level() { return 0; }
#endif

#if defined(GC_EMULATE)
int highest_level() { return best_level() > 0 ? COUNT - 1 : 0; }  // levels above AVX2 are emulated
#else
int highest_level() { return best_level(); }
#endif

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
            if (index > highest_level()) return 1;
            return chosen.store(&LEVELS[index]), 0;
        }
    return 2;
}

GC_EXPORT const char *gc_level() { return gemcutter::kernels().name; }
GC_EXPORT void gc_set_threads(int count) { gemcutter::set_threads(count); }
GC_EXPORT int gc_threads() { return gemcutter::threads(); }
GC_EXPORT int gc_version() { return 6; }  // of this interface; Python refuses another
