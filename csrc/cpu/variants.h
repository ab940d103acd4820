// The variants of a pass: one template for each pair of score and normalizer.
#pragma once

#include "../common/normalizer.h"
#include "bias.h"
#include "filter.h"

namespace geot::cpu::GEOT_ISA {

template <class S>
struct Type {
  using type = S;
};

template <class T, class Score, class Body>
void for_normalizer(const Inputs<T>& inputs, Body body) {
  inputs.is_linear ? body(Type<Score>{}, Linear{}) : body(Type<Score>{}, Softmax{});
}

// body(Type<Score>, Normalizer) of the inputs' variant, a table.
template <class T, class Body>
void for_table_variant(const Inputs<T>& inputs, Body body) {
  inputs.is_filter ? for_normalizer<T, FilterScore<T>>(inputs, body)
                   : for_normalizer<T, BiasScore<T, BiasTable<T>>>(inputs, body);
}
// The same, of a table or of Gaussians.
template <class T, class Body>
void for_variant(const Inputs<T>& inputs, Body body) {
  inputs.is_table() ? for_table_variant<T>(inputs, body)
                    : for_normalizer<T, BiasScore<T, BiasGaussians<T>>>(inputs, body);
}

}  // namespace geot::cpu::GEOT_ISA
