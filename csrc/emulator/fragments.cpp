#include "emulator/fragments.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "emulator/block.h"
#include "emulator/races.h"

namespace peftkern::emulator {
namespace {

using Lanes = Thread* const*;

const char* address_in(const Lane& lane) {
  uintptr_t address = 0;
  std::memcpy(&address, lane.in, sizeof address);
  return reinterpret_cast<const char*>(address);
}

uint16_t element(const char* row, unsigned column) {
  uint16_t bits;
  std::memcpy(&bits, row + 2 * column, 2);
  return bits;
}

// Element [row, column] of matrix m goes to half column % 2 of register m of the lane that holds
// columns (column - column % 2) of that row: 4 lanes a row. Transposed, row and column change
// places.
void load(Lanes lanes, uint32_t, unsigned matrices, bool transposed) {
  for (unsigned m = 0; m < matrices; ++m) {
    for (unsigned row = 0; row < 8; ++row) {
      const Thread& giver = *lanes[8 * m + row];
      const char* from = address_in(giver.lane);
      if (reinterpret_cast<uintptr_t>(from) % 16) {
        fail(
            "gives ldmatrix a row at an address that is no multiple of 16, at " + name(giver.place),
            giver);
      }
      for (unsigned column = 0; column < 8; ++column) {
        const unsigned r = transposed ? column : row, c = transposed ? row : column;
        Thread& taker = *lanes[4 * r + c / 2];
        races::access(taker, from + 2 * column, 2, false, false, giver.place.caller);
        uint32_t& to = taker.lane.out[m];
        const unsigned shift = 16 * (c % 2);
        to = (to & ~(0xFFFFu << shift)) | static_cast<uint32_t>(element(from, column)) << shift;
      }
    }
  }
}

const Operation kLoad2{"ldmatrix.x2", [](Lanes lanes, uint32_t m) { load(lanes, m, 2, false); }},
    kLoad4{"ldmatrix.x4", [](Lanes lanes, uint32_t m) { load(lanes, m, 4, false); }},
    kLoad4Transposed{"ldmatrix.x4.trans", [](Lanes lanes, uint32_t m) { load(lanes, m, 4, true); }};

uint16_t half(uint32_t word, unsigned which) { return static_cast<uint16_t>(word >> 16 * which); }

// What lies where, seen from the matrices: a of 2 x 2 quarters of 8 x 8, b of two halves of 8 x 8,
// d of two; in a quarter, lane 4 i + j / 2 has elements j and j + 1 of row i (of column i in b).
template <float (*to_float)(uint16_t)>
void multiply_fragments(Lanes lanes, uint32_t) {
  float a[16][16], b[16][8];
  for (unsigned i = 0; i < 16; ++i) {
    for (unsigned k = 0; k < 16; ++k) {
      const Lane& lane = lanes[i % 8 * 4 + k % 8 / 2]->lane;
      a[i][k] = to_float(half(lane.in[i / 8 + 2 * (k / 8)], k % 2));
    }
  }
  for (unsigned k = 0; k < 16; ++k) {
    for (unsigned j = 0; j < 8; ++j) {
      b[k][j] = to_float(half(lanes[j * 4 + k % 8 / 2]->lane.in[4 + k / 8], k % 2));
    }
  }
  for (unsigned i = 0; i < 16; ++i) {
    for (unsigned j = 0; j < 8; ++j) {
      Lane& lane = lanes[i % 8 * 4 + j / 2]->lane;
      const unsigned at = i / 8 * 2 + j % 2;
      double sum = std::bit_cast<float>(lane.in[6 + at]);  // the device's own order nobody knows
      for (unsigned k = 0; k < 16; ++k) sum += static_cast<double>(a[i][k]) * b[k][j];
      lane.out[at] = std::bit_cast<uint32_t>(static_cast<float>(sum));
    }
  }
}

const Operation kMultiplyBf16{"mma.m16n8k16.bf16", multiply_fragments<from_bf16>},
    kMultiplyFp16{"mma.m16n8k16.fp16", multiply_fragments<from_fp16>};

}  // namespace

void load_matrices(uint32_t* out, const void* row, int count, bool transposed) {
  Lane lane{};
  std::memcpy(lane.in, &row, sizeof row);
  const Operation& operation = transposed ? kLoad4Transposed : count == 4 ? kLoad4 : kLoad2;
  meet(operation, ~0u, lane, {{}, __builtin_return_address(0)});
  std::memcpy(out, lane.out, sizeof(uint32_t) * static_cast<size_t>(count));
}

void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
              float (*to_float)(uint16_t)) {
  Lane lane{};
  std::memcpy(lane.in, a, sizeof a);
  std::memcpy(lane.in + 4, b, sizeof b);
  std::memcpy(lane.in + 6, d, sizeof d);
  const Operation& operation = to_float == from_bf16 ? kMultiplyBf16 : kMultiplyFp16;
  meet(operation, ~0u, lane, {{}, __builtin_return_address(0)});
  std::memcpy(d, lane.out, sizeof d);
}

float from_bf16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

float from_fp16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude =
        mantissa ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  }
  return bits & 0x8000 ? -magnitude : magnitude;
}

uint16_t to_bf16(float value) {
  if (std::isnan(value)) return 0x7FFF;
  const auto bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

uint16_t to_fp16(float value) {
  if (std::isnan(value)) return 0x7FFF;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(static_cast<double>(value));
  if (magnitude >= 65520) return sign | 0x7C00;
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  // Neighbours are 2^(exponent - 11) apart, and never less than 2^-24; a step beyond the last of an
  // exponent is the first of the next.
  exponent = magnitude > 0 ? std::max(exponent, -13) : -13;
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 11 - exponent)));
  return static_cast<uint16_t>(sign | (((exponent + 13) << 10) + steps));
}

}  // namespace peftkern::emulator
