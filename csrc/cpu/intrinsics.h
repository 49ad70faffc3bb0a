// The processor's vector instructions; for tests on processors that lack them, GC_EMULATE computes the wider ones in plain C++.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(GC_EMULATE) && defined(GC_LEVEL_AVX_VNNI)
#include "../emulate/avx_vnni.h"
#endif
#if defined(GC_EMULATE) && defined(GC_LEVEL_AVX512)
#include "../emulate/avx512.h"
#endif
