// CUDA's vector types. Each is aligned as on the device, so that -fsanitize=alignment stops at an
// access that the device would refuse.
#pragma once

#define PEFTKERN_VECTORS(type, name)                                                          \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                    \
  struct name##3 { type x, y, z; };                                                           \
  struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
  constexpr name##2 make_##name##2(type x, type y) { return {x, y}; }                         \
  constexpr name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }              \
  constexpr name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

PEFTKERN_VECTORS(signed char, char)
PEFTKERN_VECTORS(unsigned char, uchar)
PEFTKERN_VECTORS(short, short)
PEFTKERN_VECTORS(unsigned short, ushort)
PEFTKERN_VECTORS(int, int)
PEFTKERN_VECTORS(unsigned int, uint)
PEFTKERN_VECTORS(long long, longlong)
PEFTKERN_VECTORS(unsigned long long, ulonglong)
PEFTKERN_VECTORS(float, float)
PEFTKERN_VECTORS(double, double)
#undef PEFTKERN_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};
