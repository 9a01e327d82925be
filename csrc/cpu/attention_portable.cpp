// Attention in plain C++ for any processor.

#include <cstring>

#include "attention_kernels.h"

namespace hetis {
namespace {

#include "attention_vector_portable.h"
#include "attention_dot.h"
#include "attention_ahead.h"
#include "attention_decode_kernel.h"
#include "attention_prefill_kernel.h"

}  // namespace

const AttentionKernels kPortableAttention[3] = {attention_table<WideDot<float>>(), attention_table<WideDot<Bf16>>(),
                                                attention_table<WideDot<Half16>>()};

}  // namespace hetis
