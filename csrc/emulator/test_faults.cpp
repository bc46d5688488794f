// Planted bugs, one for each class of fault (those of order stand in test_order.cpp, a wrong
// fragment in test_fragments.cpp); each has to be caught, in words that lead to it. What the
// sanitizers catch is asked for in their build, what the race detector catches in its own.
#include <cmath>
#include <vector>

#include "common/launch.h"
#include "common/ptx.h"
#include "common/testing.h"
#include "emulator/dies.h"

using namespace peftkern;
using namespace peftkern::emulator;

namespace {

constexpr unsigned kAll = 0xFFFFFFFFu;

// --- barriers

LINE(kDivergent);
__global__ void divergent_kernel(int* out) {
  if (threadIdx.x < 40) __syncthreads();  // kDivergent + 2
  out[threadIdx.x] = 1;
}

LINE(kTwo);
__global__ void two_barriers_kernel(int* out) {
  if (threadIdx.x % 2) {
    __syncthreads();  // kTwo + 3
  } else {
    __syncthreads();  // kTwo + 5
  }
  out[threadIdx.x] = 1;
}

void a_barrier_that_not_all_threads_reach() {
  std::vector<int> out(64);
  EXPECT_DIES(launch(divergent_kernel, 1, 64, 0, nullptr, out.data()), "waits in __syncthreads at ",
              at(kDivergent + 2), "has left the kernel without coming there",
              "in (anonymous namespace)::divergent_kernel(int*), block (0, 0, 0), thread (",
              "seed ");
  EXPECT_DIES(launch(two_barriers_kernel, 1, 64, 0, nullptr, out.data()), at(kTwo + 3),
              at(kTwo + 5), "comes to __syncthreads at ", "waits in another");
}

// --- meetings of a warp

LINE(kExited);
__global__ void exited_kernel(int* out) {
  if (threadIdx.x == 9) return;
  out[threadIdx.x] = __shfl_sync(kAll, 1, 9);  // kExited + 3
}

__global__ void missing_kernel(int* out) { out[threadIdx.x] = __shfl_xor_sync(0xFFFFu, 1, 1); }

__global__ void not_named_kernel(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xFFFFu, 1, 20);
}

__global__ void partial_kernel(int* out) { out[threadIdx.x] = __any_sync(kAll, 1); }

__global__ void mixed_kernel(int* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = __any_sync(kAll, 1);
  } else {
    out[threadIdx.x] = __all_sync(kAll, 1);
  }
}

__global__ void stuck_kernel(int* out) {
  if (threadIdx.x == 3) __syncthreads();
  __syncwarp();
  if (threadIdx.x != 3) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void fragment_kernel(float* out) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (threadIdx.x != 30) ptx::mma_m16n8k16(d, a, b, bf16{});
  out[threadIdx.x] = d[0];
}

void a_meeting_of_a_warp_that_a_lane_misses() {
  std::vector<int> out(64);
  EXPECT_DIES(launch(exited_kernel, 1, 32, 0, nullptr, out.data()), "__shfl_sync at ",
              at(kExited + 3), "has left the kernel");
  EXPECT_DIES(launch(missing_kernel, 1, 32, 0, nullptr, out.data()), "calls __shfl_xor_sync at ",
              "with a mask that lacks its own lane");
  EXPECT_DIES(launch(not_named_kernel, 1, 32, 0, nullptr, out.data()),
              "takes lane 20 in __shfl_sync at ", "which its mask does not name");
  EXPECT_DIES(launch(partial_kernel, 1, 40, 0, nullptr, out.data()), "calls __any_sync at ",
              "with a mask that names lane 8, which the block lacks");
  EXPECT_DIES(launch(mixed_kernel, 1, 32, 0, nullptr, out.data()), "__any_sync at ",
              "__all_sync at ", "which its mask names, waits in ");
  EXPECT_DIES(launch(stuck_kernel, 1, 32, 0, nullptr, out.data()), "waits in __syncwarp at ",
              "for thread (3, 0, 0), which waits in __syncthreads at ");
  std::vector<float> d(32);
  EXPECT_DIES(launch(fragment_kernel, 1, 32, 0, nullptr, d.data()), "mma.m16n8k16.bf16",
              "has left the kernel");
}

// --- memory that is not one's own

__global__ void past_global_kernel(float* out) { out[threadIdx.x + 1] = 1; }

// Not inlined, so that the compiler does not know the array.
__device__ __attribute__((noinline)) void store(float* to) { *to = 1; }

template <int kThreads>
__global__ void past_shared_kernel(float* out, int64_t past) {
  __shared__ float x[kThreads];
  store(x + threadIdx.x + past);
  __syncthreads();
  out[threadIdx.x] = x[kThreads - 1 - threadIdx.x];
}

__global__ void past_dynamic_kernel(float* out, int64_t past) {
  auto* x = static_cast<float*>(ptx::dynamic_shared());
  x[threadIdx.x + past] = 1;
  __syncthreads();
  out[threadIdx.x] = x[threadIdx.x + past];
}

void memory_out_of_bounds() {
  if (!kSanitized) return;
  std::vector<float> out(32);
  EXPECT_DIES(launch(past_global_kernel, 1, 32, 0, nullptr, out.data()), "heap-buffer-overflow",
              "past_global_kernel", "test_faults.cpp:", "thread (31, 0, 0), seed ");
  EXPECT_DIES(launch(past_shared_kernel<32>, 1, 32, 0, nullptr, out.data(), 1),
              "global-buffer-overflow", "past_shared_kernel", "thread (31, 0, 0), seed ");
  EXPECT_DIES(launch(past_dynamic_kernel, 1, 32, 128, nullptr, out.data(), 1),
              "heap-buffer-overflow", "past_dynamic_kernel", "thread (31, 0, 0), seed ");
}

__global__ void vector_kernel(const float* in, float4* out) {
  out[threadIdx.x] = *reinterpret_cast<const float4*>(in + 4 * threadIdx.x);
}

__global__ void pair_kernel(const uint8_t* in, uint32_t* out) {
  out[threadIdx.x] = *reinterpret_cast<const uint16_t*>(in + 2 * threadIdx.x);
}

__global__ void copy_kernel(const char* in, float* out, int64_t to) {
  char* x = static_cast<char*>(ptx::dynamic_shared());
  ptx::cp_async_16(x + to, in, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  out[0] = *reinterpret_cast<float*>(x + to);
}

__global__ void row_kernel(uint32_t* out) {
  auto* x = static_cast<uint16_t*>(ptx::dynamic_shared());
  for (unsigned i = threadIdx.x; i < 260; i += 32) x[i] = 1;
  __syncthreads();
  uint32_t words[4];
  ptx::ldmatrix_x4(words, x + 8 * threadIdx.x + 4);
  out[threadIdx.x] = words[0];
}

void an_access_that_is_not_aligned() {
  alignas(16) float in[132] = {};
  alignas(16) float4 out[32];
  if (kSanitized || kRaces) {
    EXPECT_DIES(launch(vector_kernel, 1, 32, 0, nullptr, in + 1, out), "test_faults.cpp:",
                kSanitized ? "misaligned address" : "reads 16 bytes at an address",
                kSanitized ? "requires 16 byte alignment" : "vector_kernel");
    uint32_t pairs[32];
    EXPECT_DIES(
        launch(pair_kernel, 1, 32, 0, nullptr, reinterpret_cast<uint8_t*>(in) + 1, pairs),
        "test_faults.cpp:", kSanitized ? "misaligned address" : "reads 2 bytes at an address",
        kSanitized ? "requires 2 byte alignment" : "pair_kernel");
  }
  const auto* bytes = reinterpret_cast<const char*>(in);
  float sum;
  EXPECT_DIES(launch(copy_kernel, 1, 1, 64, nullptr, bytes + 8, &sum, 0),
              "copies 16 bytes from an address that is no multiple of 16, at ", "test_faults.cpp:");
  EXPECT_DIES(launch(copy_kernel, 1, 1, 64, nullptr, bytes, &sum, 4),
              "copies 16 bytes to an address that is no multiple of 16, at ", "test_faults.cpp:");
  uint32_t words[32];
  EXPECT_DIES(launch(row_kernel, 1, 32, 528, nullptr, words),
              "gives ldmatrix a row at an address that is no multiple of 16, at ",
              "test_faults.cpp:");
}

// --- outputs

__global__ void forgetful_kernel(float* out, int count) {
  const auto i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count - 1) out[i] = 1;
}

// Tests from Python start outputs as NaN too (poison, common/binding.h).
void an_output_that_nobody_writes() {
  std::vector<float> out(100, NAN);
  EXPECT(launch(forgetful_kernel, 4, 32, 0, nullptr, out.data(), 100) == cudaSuccess);
  EXPECT(out[98] == 1 && std::isnan(out[99]));
}

// --- and after a fault

void the_next_launch_is_not_disturbed() {
  std::vector<int> out(64);
  for (int i = 0; i < 3; ++i) {
    bool faulted = false;
    try {
      launch(divergent_kernel, 1, 64, 0, nullptr, out.data());
    } catch (const Fault&) {
      faulted = true;
    }
    EXPECT(faulted);
  }
  std::vector<float> in(64);
  EXPECT(launch(past_dynamic_kernel, 1, 32, 128, nullptr, in.data(), 0) == cudaSuccess);
  EXPECT(in[31] == 1 && in[32] == 0);
}

}  // namespace

int main() {
  RUN(a_barrier_that_not_all_threads_reach);
  RUN(a_meeting_of_a_warp_that_a_lane_misses);
  RUN(memory_out_of_bounds);
  RUN(an_access_that_is_not_aligned);
  RUN(an_output_that_nobody_writes);
  RUN(the_next_launch_is_not_disturbed);
}
