// onebit: matrices of 1, 2 or 4 bits a weight, with one mean and one std.
//
//   mean, std   of all n elements w of a matrix, std over n - 1; std 0 where it is nothing but
//               rounding (kRounding), or n is 1
//   code        = how many thresholds t have  w - mean > t * (std + kEps): a tie takes the lower;
//               0 where std is 0, and for what is no number
//   W           = mean + std * level[code], two roundings, and one more to a 16-bit dtype
//   grad_w      = r * grad + (1 - r) * S1 / n + (w - mean) / ((n - 1) * std) * S2
//                 r = std / (std + kEps), S1 = sum(grad), S2 = sum(grad * (level[code] - r * u)),
//                 u = (w - mean) / (std + kEps); the first and the last are none where std is 0
//
// Packed: each row begins with a byte of its own, and what is left of its last byte is zero.
//   bit         7    6    5    4    3    2    1    0         of byte j
//   1 bit      c7   c6   c5   c4   c3   c2   c1   c0         c[i] = code[8 j + i]
//   2 bits    [  c3  ]  [  c2  ]  [  c1  ]  [  c0  ]         c[i] = code[4 j + i]
//   4 bits    [       c1       ]  [       c0       ]         c[i] = code[2 j + i]
//
// Sums are float over kPiece elements, lane i taking those at i modulo kSumLanes, and then double
// in order: neither threads nor instruction sets change a bit of statistics, codes and W. A double
// weight has doubles throughout, in fewer lanes. Threads belong to the caller, who gives each a
// range of outputs.
#pragma once
#include <cstdint>

#include "common/half.h"
#include "common/isa.h"

namespace peftkern::onebit {

inline constexpr double kEps = 1e-5;
inline constexpr double kRounding = 8;  // times the dtype's own, and max(1, |mean|)
inline constexpr int64_t kPiece = 4096, kSumLanes = 64;
constexpr int64_t pieces_of(int64_t count) { return (count + kPiece - 1) / kPiece; }
constexpr bool is_bits(int64_t bits) { return bits == 1 || bits == 2 || bits == 4; }
constexpr int64_t bytes_of(int64_t width, int64_t bits) { return (width * bits + 7) / 8; }

// The upper half of the levels, of which the lower is the mirror image. Whence:
// peftkern/onebit/reference.py, against which tests hold them. Not inline, or the linker would
// choose among the instruction sets' copies.
constexpr double kUpperOfOne[] = {0.6744897501960817};
constexpr double kUpperOfTwo[] = {0.37775416114944965, 1.2657203250220042};
constexpr double kUpperOfFour[] = {0.105550281539223,  0.31903599695324814, 0.5400720588695923,
                                   0.775192048082489,  1.0340062776501844,  1.3331066789546941,
                                   1.7077375651639932, 2.2654906133785};

constexpr double level(int64_t bits, int64_t code) {
  const double* upper = bits == 1 ? kUpperOfOne : bits == 2 ? kUpperOfTwo : kUpperOfFour;
  const int64_t half = int64_t{1} << (bits - 1);
  return code < half ? -upper[half - 1 - code] : upper[code - half];
}

// A matrix's quantiser, in the type of its sums: float, or double for double.
template <typename A>
struct Quantizer {
  A mean;
  A limits[16];  // [2^bits - 1] of t * (std + kEps), rising; infinite from there on
  A values[16];  // [2^bits] of mean + std * level
  int64_t bits;
};

// What the gradient of a latent weight takes beside the gradient of W.
template <typename A>
struct Slopes {
  A levels[16];       // [2^bits]
  A straight, along;  // r; r / (std + kEps), which times w - mean is r * u
  // Of the second pass, known once both sums are: (1 - r) * S1 / n, and S2 / ((n - 1) * std).
  A shift, slope;
};

// T: the weight's type, A: that of its sums.
template <typename T, typename A>
struct TypedKernels {
  // sums[2 p], sums[2 p + 1] of piece p: of w - mean; and of its square where asked for, else 0.
  void (*sums)(const T* weight, int64_t count, A mean, bool squares, int64_t begin, int64_t end,
               double* sums);
  // out[i] = W[i] of elements [begin, end), where out and weight begin at element 0.
  void (*quantize)(const T* weight, const Quantizer<A>& by, int64_t begin, int64_t end, T* out);
  // Packed codes of rows [begin, end).
  void (*encode)(const T* weight, const Quantizer<A>& by, int64_t columns, int64_t begin,
                 int64_t end, uint8_t* packed);
  // sums[2 p], sums[2 p + 1] of piece p: S1 and S2.
  void (*slope_sums)(const A* grad, const T* weight, const Quantizer<A>& by,
                     const Slopes<A>& slopes, int64_t count, int64_t begin, int64_t end,
                     double* sums);
  // out[i] = grad_w[i] of elements [begin, end).
  void (*slope)(const A* grad, const T* weight, const Quantizer<A>& by, const Slopes<A>& slopes,
                int64_t begin, int64_t end, T* out);
  // W of rows [begin, end) of `packed`, in any dtype T; of `by` the values alone are asked for.
  void (*dequantize)(const uint8_t* packed, const Quantizer<A>& by, int64_t columns, int64_t begin,
                     int64_t end, T* out);
};

struct Kernels {
  TypedKernels<float, float> f32;
  TypedKernels<double, double> f64;
  TypedKernels<peftkern::bf16, float> bf16;
  TypedKernels<peftkern::fp16, float> fp16;
  // One row of codes to bytes, of which the low bits count; and back.
  void (*pack)(const uint8_t* codes, int64_t width, int64_t bits, uint8_t* packed);
  void (*unpack)(const uint8_t* packed, int64_t width, int64_t bits, uint8_t* codes);
};

PEFTKERN_DECLARE(Kernels, kernels)

inline const Kernels& kernels() { return PEFTKERN_SELECT(kernels); }

}  // namespace peftkern::onebit
