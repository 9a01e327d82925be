// Loops over rows for each instruction set, and the choice of one.

#include <type_traits>

#include "dense_isa.h"
#include "dense_rows.h"
#include "dense_vector.h"

namespace hetis {

namespace portable {
#include "dense_rows_loops.h"
}  // namespace portable

#if HETIS_X86

HETIS_TARGET_BEGIN(HETIS_AVX2)
namespace avx2 {
#include "dense_rows_loops.h"
}  // namespace avx2
HETIS_TARGET_END

HETIS_TARGET_BEGIN(HETIS_AVX512)
namespace avx512 {
#include "dense_rows_loops.h"
}  // namespace avx512
HETIS_TARGET_END

HETIS_TARGET_BEGIN(HETIS_AVX512_BF16)
namespace avx512_bf16 {
#include "dense_rows_loops.h"
}  // namespace avx512_bf16
HETIS_TARGET_END

#endif

template <class T>
RowKernels<T> row_kernels() {
#if HETIS_X86
  const Isa isa = dense_isa();
  if constexpr (std::is_same_v<T, BFloat16>)
    if (isa == Isa::avx512_bf16) return avx512_bf16::kernels<T>();
  if (isa >= Isa::avx512) return avx512::kernels<T>();
  if (isa == Isa::avx2) return avx2::kernels<T>();
#endif
  return portable::kernels<T>();
}

template RowKernels<float> row_kernels<float>();
template RowKernels<BFloat16> row_kernels<BFloat16>();
template RowKernels<Half> row_kernels<Half>();

}  // namespace hetis
