// ldmatrix and mma, by the lanes of a whole warp.
#pragma once
#include <cstdint>

namespace peftkern::emulator {

// 8 x 8 matrices of 16-bit elements, `count` of them; lane i gives row i % 8 of matrix i / 8.
void load_matrices(uint32_t* out, const void* row, int count, bool transposed);

// d [16, 8] += a [16, 16] b [16, 8]; each element of a and b is what `to_float` makes of it.
void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
              float (*to_float)(uint16_t));

float from_bf16(uint16_t bits);
float from_fp16(uint16_t bits);
uint16_t to_bf16(float value);  // to nearest, a tie to the even one
uint16_t to_fp16(float value);

}  // namespace peftkern::emulator
