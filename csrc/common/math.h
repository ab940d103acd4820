// Functions of scalars and of SIMD vectors: whoever has a type V defines Math<V>, with the static
// functions `sqrt` and `exp`.
#pragma once

#include "macros.h"

namespace geot {

template <class V>
struct Math;

}  // namespace geot
