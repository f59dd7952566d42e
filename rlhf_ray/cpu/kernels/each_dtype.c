// Functions over a model's numbers, for both dtypes that models compute in on CPUs.

#include <stdlib.h>

#include "decode.h"
#include "vectors.h"

static inline float same(float value) { return value; }

#define widen(value) _Generic((value), bf16: from_bf16, float: same)(value)
#define get(from, left) _Generic((from), bf16 *: load_bf16, const bf16 *: load_bf16, float *: load, const float *: load)(from, left)
#define put(to, value, left) _Generic((to), bf16 *: store_bf16, float *: store)(to, value, left)

enum { STEP = 16 };  // numbers of a vector: what is left over beside whole ones is worked on one by one

#define number bf16
#define NAME(function) function##_bfloat16
#define narrow to_bf16
#include "each_dtype.h"
#undef number
#undef NAME
#undef narrow

#define number float
#define NAME(function) function##_float32
#define narrow same
#include "each_dtype.h"
