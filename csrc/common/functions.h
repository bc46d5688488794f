// exp, tanh and erf of a vector, to one or two units in the last place; doubles go to the C
// library. The polynomials are our own fits, to the error named beside each.
#pragma once
#include <math.h>

#include "common/blocks.h"

namespace peftkern::PEFTKERN_ISA {

// Where the mask's lanes are all ones the first, elsewhere the second.
PEFTKERN_INLINE F choose(I mask, F a, F b) { return F((U(mask) & U(a)) | (~U(mask) & U(b))); }
PEFTKERN_INLINE double choose(bool mask, double a, double b) { return mask ? a : b; }
PEFTKERN_INLINE F magnitude(F x) { return F(U(x) & 0x7FFFFFFFu); }
PEFTKERN_INLINE F with_sign_of(F x, F sign) { return F(U(x) | (U(sign) & 0x80000000u)); }

// Finite: what is above 88 is taken for 88, what is below -87 for -87. A NaN stays one.
PEFTKERN_INLINE F exp(F x) {
  x = choose(x > splat(88.0f), splat(88.0f), x);
  x = choose(x < splat(-87.0f), splat(-87.0f), x);
  // The nearest integer stands in the low bits of a number that is too large for a fraction.
  const F magic = splat(12582912.0f), shifted = fma(x, splat(1.44269504f), magic),
          whole = shifted - magic;
  F r = fma(whole, splat(-0.693359375f), x);  // ln 2 in two parts, the first of few bits
  r = fma(whole, splat(2.12194440e-4f), r);
  F p = splat(0.00138146104f);  // exp(r) = 1 + r + r^2 p(r): 3e-9
  p = fma(p, r, splat(0.00836871006f));
  p = fma(p, r, splat(0.041668389f));
  p = fma(p, r, splat(0.166665211f));
  p = fma(p, r, splat(0.49999994f));
  p = fma(p * r, r, r) + 1.0f;
  return p * F((U(shifted) << 23) + 0x3F800000u);
}
PEFTKERN_INLINE double exp(double x) { return ::exp(x); }

template <typename X>
PEFTKERN_INLINE X sigmoid(X x) {
  return 1 / (1 + exp(-x));
}

PEFTKERN_INLINE F tanh(F x) {
  const F size = magnitude(x), square = x * x;
  F p = splat(-0.00570499059f);  // x + x^3 p(x^2) up to 0.625: 4e-9
  p = fma(p, square, splat(0.0206390899f));
  p = fma(p, square, splat(-0.0537397154f));
  p = fma(p, square, splat(0.133314416f));
  p = fma(p, square, splat(-0.333332807f));
  const F small = fma(p * square, x, x), large = 1 - 2 / (exp(2 * size) + 1);
  return choose(size < splat(0.625f), small, with_sign_of(large, x));
}
PEFTKERN_INLINE double tanh(double x) { return ::tanh(x); }

PEFTKERN_INLINE F erf(F x) {
  const F size = magnitude(x), square = x * x;
  F p = splat(8.18523185e-5f);  // x + x p(x^2) up to 0.95: 6e-10
  p = fma(p, square, splat(-0.000809774443f));
  p = fma(p, square, splat(0.00519695692f));
  p = fma(p, square, splat(-0.0268577076f));
  p = fma(p, square, splat(0.112836644f));
  p = fma(p, square, splat(-0.376126319f));
  p = fma(p, square, splat(0.128379166f));
  const F small = fma(p, x, x);
  const F t = choose(size > splat(4.2f), splat(4.2f), size);  // from there on it rounds to 1
  F q = splat(-0.000194946871f);                              // 1 - exp(-t - q(t)): 2e-9
  q = fma(q, t, splat(0.00303369341f));
  q = fma(q, t, splat(-0.0221897811f));
  q = fma(q, t, splat(0.103856385f));
  q = fma(q, t, splat(0.637265742f));
  q = fma(q, t, splat(0.127627403f));
  q = fma(q, t, splat(0.000207007484f));
  const F large = with_sign_of(1 - exp(-t - q), x);
  return choose(size < splat(0.95f), small, large);
}
PEFTKERN_INLINE double erf(double x) { return ::erf(x); }

}  // namespace peftkern::PEFTKERN_ISA
