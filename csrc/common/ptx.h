// Instructions that CUDA C++ has no name for, one function each, and beside each its twin for the
// emulator (csrc/emulator). Needs sm_80. Which lane holds which element of a fragment is said here
// once; lane = 4 * group + member, group 0 to 7, member 0 to 3.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "common/half.h"
#if defined(PEFTKERN_EMULATED)
#include "emulator/copies.h"
#include "emulator/fragments.h"
#include "emulator/shared.h"
#endif

namespace peftkern::ptx {

// The block's dynamic shared memory, 16-byte aligned.
__device__ inline void* dynamic_shared() {
#if defined(PEFTKERN_EMULATED)
  return emulator::dynamic_shared();
#else
  extern __shared__ uint4 peftkern_dynamic_shared[];
  return peftkern_dynamic_shared;
#endif
}

#if !defined(PEFTKERN_EMULATED)
__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
#endif

// Copies 16 bytes without passing through registers or the first-level cache; they are there once
// their group was waited for. Where not `valid`, 16 bytes of zero, and `global` is not read. Both
// addresses are multiples of 16.
__device__ inline void cp_async_16(void* shared, const void* global, bool valid) {
#if defined(PEFTKERN_EMULATED)
  emulator::start_copy(shared, global, valid);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#endif
}

// This thread's copies since the last commit become a group.
__device__ inline void cp_async_commit() {
#if defined(PEFTKERN_EMULATED)
  emulator::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kPending of this thread's groups are under way, the newest. What other
// threads copied is there after a barrier that follows.
template <int kPending>
__device__ inline void cp_async_wait() {
#if defined(PEFTKERN_EMULATED)
  emulator::wait_for_copies(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Four 8 x 8 matrices of 16-bit elements: lanes 8 i to 8 i + 7 give the addresses of matrix i's
// rows (16 bytes each, aligned); out[i] of a lane holds row `group`, columns 2 * member and 2 *
// member + 1, the first in the low half.
__device__ inline void ldmatrix_x4(uint32_t (&out)[4], const void* shared) {
#if defined(PEFTKERN_EMULATED)
  emulator::load_matrices(out, shared, 4, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(shared))
               : "memory");
#endif
}

// The same of their transposes: out[i] holds column `group`, rows 2 * member and 2 * member + 1.
__device__ inline void ldmatrix_x4_trans(uint32_t (&out)[4], const void* shared) {
#if defined(PEFTKERN_EMULATED)
  emulator::load_matrices(out, shared, 4, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(shared))
               : "memory");
#endif
}

// Two matrices; the addresses of lanes 16 to 31 are not used.
__device__ inline void ldmatrix_x2(uint32_t (&out)[2], const void* shared) {
#if defined(PEFTKERN_EMULATED)
  emulator::load_matrices(out, shared, 2, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(out[0]), "=r"(out[1])
               : "r"(shared_address(shared))
               : "memory");
#endif
}

// d [16, 8] += a [16, 16] b [16, 8], in float. Two elements lie in a register, the first in its low
// half:
//   a[0]: row group,     columns 2 member, + 1     a[2]: row group,     columns 2 member + 8, + 9
//   a[1]: row group + 8, columns 2 member, + 1     a[3]: row group + 8, columns 2 member + 8, + 9
//   b[0]: rows 2 member, + 1, column group         b[1]: rows 2 member + 8, + 9, column group
//   d[0], d[1]: row group, columns 2 member, + 1   d[2], d[3]: row group + 8, the same columns
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    bf16) {
#if defined(PEFTKERN_EMULATED)
  emulator::multiply(d, a, b, emulator::from_bf16);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    fp16) {
#if defined(PEFTKERN_EMULATED)
  emulator::multiply(d, a, b, emulator::from_fp16);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Two numbers rounded to nearest, a tie to the even one; `low` in the low half.
__device__ inline uint32_t pack_bf16x2(float low, float high) {
#if defined(PEFTKERN_EMULATED)
  return emulator::to_bf16(low) | static_cast<uint32_t>(emulator::to_bf16(high)) << 16;
#else
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
#endif
}

__device__ inline uint32_t pack_fp16x2(float low, float high) {
#if defined(PEFTKERN_EMULATED)
  return emulator::to_fp16(low) | static_cast<uint32_t>(emulator::to_fp16(high)) << 16;
#else
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
#endif
}

__device__ inline float to_float(fp16 value) {
#if defined(PEFTKERN_EMULATED)
  return emulator::from_fp16(value.bits);
#else
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value.bits));
  return out;
#endif
}

// (value & mask) | bits, in one instruction: left to itself, the compiler at times takes two.
__device__ inline uint32_t and_or(uint32_t value, uint32_t mask, uint32_t bits) {
#if defined(PEFTKERN_EMULATED)
  return (value & mask) | bits;
#else
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(out) : "r"(value), "r"(mask), "r"(bits));
  return out;
#endif
}

// Has the compiler keep a number in a register: left to itself, it may form what depends on the
// thread alone anew in each turn of a loop.
__device__ inline int keep(int value) {
#if !defined(PEFTKERN_EMULATED)
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// What nobody reads again soon: it takes no room in the first-level cache.
__device__ inline uint4 load_streaming(const uint4* global) {
#if defined(PEFTKERN_EMULATED)
  return *global;
#else
  uint4 out;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
               : "l"(global));
  return out;
#endif
}

}  // namespace peftkern::ptx
