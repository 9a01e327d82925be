// Attention for processors with AVX-512 (F, BW, DQ and VL).

#include <cstring>

#include "attention_kernels.h"

#if HETIS_X86
#include <immintrin.h>

namespace hetis {
namespace {

HETIS_TARGET_BEGIN(HETIS_AVX512)
#include "attention_vector_avx512.h"
#include "attention_dot.h"
#include "attention_ahead.h"
#include "attention_decode_kernel.h"
#include "attention_prefill_kernel.h"
HETIS_TARGET_END

}  // namespace

const AttentionKernels kAvx512Attention[3] = {attention_table<WideDot<float>>(), attention_table<WideDot<Bf16>>(),
                                              attention_table<WideDot<Half16>>()};

}  // namespace hetis
#endif
