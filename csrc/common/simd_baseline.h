// Eight lanes in what every CPU has: loops that the compiler makes of it what it can. Part of
// simd.h.
#pragma once

namespace peftkern::PEFTKERN_ISA {

PEFTKERN_INLINE F fma(F a, F b, F c) { return a * b + c; }
PEFTKERN_INLINE float sum(F v) {
  float total = 0;
  for (int i = 0; i < W; ++i) total += v[i];
  return total;
}
PEFTKERN_INLINE F load_first(const float* from, int64_t n) {
  F v{};
  for (int i = 0; i < W && i < n; ++i) v[i] = from[i];
  return v;
}
PEFTKERN_INLINE U load_first(const uint32_t* from, int64_t n) {
  U v{};  // packed bytes may lie anywhere
  if (n > 0) std::memcpy(&v, from, static_cast<size_t>(min(n, W)) * sizeof(uint32_t));
  return v;
}
PEFTKERN_INLINE F permute(F v, U index) {
  F out;
  for (int i = 0; i < W; ++i) out[i] = v[index[i] & (W - 1)];
  return out;
}
PEFTKERN_INLINE U load_bytes(const uint8_t* from) {
  U v;
  for (int i = 0; i < W; ++i) v[i] = from[i];
  return v;
}
PEFTKERN_INLINE F gather(const float* table, const uint8_t* bytes) {
  F v;
  for (int i = 0; i < W; ++i) v[i] = table[bytes[i]];
  return v;
}
PEFTKERN_INLINE void stream(float* to, F v) { store(to, v); }
PEFTKERN_INLINE void end_stream() {}

struct Table {
  const float* values;
  explicit Table(const float* v) : values(v) {}
  PEFTKERN_INLINE F look_up(const Table& t, U index) {
    F out;
    for (int i = 0; i < W; ++i) out[i] = t.values[index[i] & 15];
    return out;
  }
};
PEFTKERN_INLINE U codes(const uint8_t* packed) {
  U out;
  for (int i = 0; i < W; ++i) out[i] = i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4;
  return out;
}
PEFTKERN_INLINE void pack(uint8_t* to, U code) {
  for (int i = 0; i < W; i += 2) to[i / 2] = static_cast<uint8_t>(code[i] << 4 | code[i + 1]);
}
PEFTKERN_INLINE U64 multiply_even(U a, U b) {
  U64 out;
  for (int i = 0; i < W / 2; ++i) out[i] = static_cast<uint64_t>(a[2 * i]) * b[2 * i];
  return out;
}
PEFTKERN_INLINE float to_float(fp16 h) {
  const uint32_t sign = (h.bits & 0x8000u) << 16, magnitude = h.bits & 0x7FFFu;
  float value;
  if (magnitude >= 0x7C00u) {  // infinity or NaN
    const uint32_t bits = sign | 0x7F800000u | (magnitude & 0x3FFu) << 13;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  // The exponent is right once the value, read as a float, is multiplied by 2^112; this holds for
  // subnormal halves too.
  const uint32_t bits = magnitude << 13;
  std::memcpy(&value, &bits, sizeof value);
  value *= 0x1p112f;
  return sign ? -value : value;
}
PEFTKERN_INLINE fp16 to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits & 0x80000000u) >> 16);
  bits &= 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return {static_cast<uint16_t>(sign | 0x7E00u)};
  if (bits >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};
  if (bits < 0x38800000u) {  // subnormal: adding 0.5 lets the unit round at the right place
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return {static_cast<uint16_t>(sign | (bits - 0x3F000000u))};
  }
  bits += 0xFFFu + (bits >> 13 & 1);
  return {static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13))};
}
PEFTKERN_INLINE F load(const fp16* from) {
  F v;
  for (int i = 0; i < W; ++i) v[i] = to_float(from[i]);
  return v;
}
PEFTKERN_INLINE void store(fp16* to, F v) {
  for (int i = 0; i < W; ++i) to[i] = to_half(v[i]);
}
PEFTKERN_INLINE U widen(const uint16_t* from) {
  U v;
  for (int i = 0; i < W; ++i) v[i] = from[i];
  return v;
}
PEFTKERN_INLINE void narrow(uint16_t* to, U v) {
  for (int i = 0; i < W; ++i) to[i] = static_cast<uint16_t>(v[i]);
}
PEFTKERN_INLINE F load(const int8_t* from) {
  F v;
  for (int i = 0; i < W; ++i) v[i] = static_cast<float>(from[i]);
  return v;
}
PEFTKERN_INLINE void narrow(int8_t* to, U v) {
  for (int i = 0; i < W; ++i) to[i] = static_cast<int8_t>(v[i] & 0xFFu);
}

// code + step where v is not at most this; what is no number counts as above.
PEFTKERN_INLINE U step_up(U code, uint32_t step, F v, F threshold) {
  return code + (~U(v <= threshold) & step);
}

}  // namespace peftkern::PEFTKERN_ISA
