// What CUDA promises to a kernel, the emulator keeps. In the build with the race detector these
// kernels, which are right, must also pass without a word.
#include <cstring>
#include <vector>

#include "common/launch.h"
#include "common/ptx.h"
#include "common/testing.h"

using namespace peftkern;

namespace {

__global__ void count_kernel(int* counts) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  counts[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1;
}

void every_thread_of_every_block_runs_once() {
  std::vector<int> counts(5 * 3 * 2 * 7 * 4 * 3);
  EXPECT(launch(count_kernel, dim3(5, 3, 2), dim3(7, 4, 3), 0, nullptr, counts.data()) == 0);
  EXPECT(counts == std::vector<int>(counts.size(), 1));
}

template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads) reverse_kernel(const T* in, T* out, int64_t rounds) {
  __shared__ T first[kThreads];
  T* second = static_cast<T*>(ptx::dynamic_shared());
  first[threadIdx.x] = in[blockIdx.x * kThreads + threadIdx.x];
  for (int64_t i = 0; i < rounds; ++i) {
    __syncthreads();
    second[threadIdx.x] = first[kThreads - 1 - threadIdx.x];
    __syncthreads();
    first[threadIdx.x] = second[threadIdx.x];
  }
  out[blockIdx.x * kThreads + threadIdx.x] = first[threadIdx.x];
}

template <typename T>
void barriers_order_what_threads_see() {
  constexpr int kThreads = 256;
  std::vector<T> in(3 * kThreads), out(in.size());
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<T>(i);
  EXPECT(launch(reverse_kernel<T, kThreads>, dim3(3), dim3(kThreads), kThreads * sizeof(T), nullptr,
                in.data(), out.data(), 101) == cudaSuccess);
  for (size_t i = 0; i < in.size(); ++i) {
    EXPECT(out[i] == in[i / kThreads * kThreads + kThreads - 1 - i % kThreads]);
  }
}

#if !defined(PEFTKERN_RACES)  // there, what this kernel does is an error
__global__ void fresh_kernel(uint32_t* seen) {
  __shared__ uint32_t left[1];
  *seen = left[0];
  left[0] = 1;
}

void shared_memory_starts_as_nan_in_every_block() {
  uint32_t seen = 0;
  EXPECT(launch(fresh_kernel, dim3(2), dim3(1), 0, nullptr, &seen) == cudaSuccess);
  EXPECT(seen == 0xFFFFFFFFu);
}
#endif

__global__ void order_kernel(int* order, int* next) { order[atomicAdd(next, 1)] = threadIdx.x; }

std::vector<int> an_order() {
  std::vector<int> order(64);
  int next = 0;
  EXPECT(launch(order_kernel, dim3(1), dim3(64), 0, nullptr, order.data(), &next) == cudaSuccess);
  return order;
}

void the_seed_decides_who_goes_first() {
  EXPECT(an_order() != an_order());
  setenv("PEFTKERN_EMULATOR_SEED", "7", 1);
  const std::vector<int> seventh = an_order();
  EXPECT(an_order() == seventh);
  setenv("PEFTKERN_EMULATOR_SEED", "8", 1);
  EXPECT(an_order() != seventh);
  unsetenv("PEFTKERN_EMULATOR_SEED");
}

void a_launch_beyond_the_limits_is_an_error() {
  std::vector<int> counts(1);
  const auto status = [&](dim3 grid, dim3 block, size_t shared) {
    return launch(count_kernel, grid, block, shared, nullptr, counts.data());
  };
  EXPECT(status(0, 1, 0) == cudaErrorInvalidConfiguration);
  EXPECT(status({1, 0}, 1, 0) == cudaErrorInvalidConfiguration);
  EXPECT(status({1, 65536}, 1, 0) == cudaErrorInvalidConfiguration);
  EXPECT(status(1, 0, 0) == cudaErrorInvalidConfiguration);
  EXPECT(status(1, 1025, 0) == cudaErrorInvalidConfiguration);
  EXPECT(status(1, {32, 33}, 0) == cudaErrorInvalidConfiguration);
  EXPECT(status(1, {1, 1, 65}, 0) == cudaErrorInvalidConfiguration);
  EXPECT(status(1, 1, (size_t{99} << 10) + 1) == cudaErrorInvalidValue);
  EXPECT(counts[0] == 0);
  EXPECT(status(1, 1, size_t{99} << 10) == cudaSuccess && counts[0] == 1);
}

template <int kFloats>
__global__ void large_kernel(float* out) {
  __shared__ float x[kFloats];
  x[threadIdx.x] = 1;
  __syncthreads();
  *out = x[threadIdx.x];
}

void a_kernels_own_shared_memory_counts() {
  constexpr auto largest_kernel = large_kernel<48 << 8>;
  float out = 0;
  EXPECT(launch(large_kernel<(48 << 8) + 1>, 1, 1, 0, nullptr, &out) == cudaErrorInvalidValue &&
         out == 0);
  EXPECT(launch(largest_kernel, 1, 1, size_t{51} << 10, nullptr, &out) == cudaSuccess && out == 1);
  EXPECT(launch(largest_kernel, 1, 1, size_t{52} << 10, nullptr, &out) == cudaErrorInvalidValue);
}

__global__ void histogram_kernel(const int* values, int count, int* out) {
  __shared__ int bins[8];
  if (threadIdx.x < 8) bins[threadIdx.x] = 0;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    atomicAdd(&bins[values[i]], 1);
  }
  __syncthreads();
  if (threadIdx.x < 8) atomicAdd(&out[threadIdx.x], bins[threadIdx.x]);
}

__global__ void other_atomics_kernel(int* out) {
  atomicMax(&out[0], static_cast<int>(threadIdx.x));
  atomicMin(&out[1], -static_cast<int>(threadIdx.x));
  atomicOr(&out[2], 1 << threadIdx.x % 8);
  atomicAnd(&out[3], ~(1 << threadIdx.x % 8));
  atomicXor(&out[4], 1);
  atomicSub(&out[5], 2);
  atomicExch(&out[6], 6);
  while (atomicCAS(&out[7], static_cast<int>(threadIdx.x), -1) == static_cast<int>(threadIdx.x)) {
  }
}

void atomics_lose_nothing() {
  std::vector<int> values(1000), bins(8);
  for (int i = 0; i < 1000; ++i) values[static_cast<size_t>(i)] = i * i % 8;
  EXPECT(launch(histogram_kernel, 1, 96, 0, nullptr, values.data(), 1000, bins.data()) == 0);
  EXPECT((bins == std::vector<int>{250, 500, 0, 0, 250, 0, 0, 0}));
  std::vector<int> out{0, 0, 0, 255, 0, 0, 0, 5};
  EXPECT(launch(other_atomics_kernel, 1, 99, 0, nullptr, out.data()) == cudaSuccess);
  EXPECT((out == std::vector<int>{98, -98, 255, 0, 1, -198, 6, -1}));
}

__global__ void rows_kernel(const uint4* in, uint4* out, int64_t rows) {
  const int64_t row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows) return;  // early, where no barrier follows
  out[row] = ptx::load_streaming(in + row);
}

void threads_may_leave_where_no_barrier_follows() {
  std::vector<uint4> in(77), out(77);
  std::memset(in.data(), 0x5A, 77 * 16);
  EXPECT(launch(rows_kernel, 2, 64, 0, nullptr, in.data(), out.data(), 77) == cudaSuccess);
  EXPECT(std::memcmp(in.data(), out.data(), 77 * 16) == 0);
}

__global__ void ring_kernel(const float* in, float* out, int stages) {
  auto* ring = static_cast<float4*>(ptx::dynamic_shared());
  const auto copy = [&](int stage) {
    const bool valid = stage < stages;
    ptx::cp_async_16(&ring[stage % 3 * 32 + threadIdx.x],
                     in + (valid ? stage * 128 + threadIdx.x * 4 : 0), valid);
    ptx::cp_async_commit();
  };
  copy(0);
  copy(1);
  float sum = 0;
  for (int i = 0; i < stages + 2; ++i) {
    copy(i + 2);
    ptx::cp_async_wait<2>();
    __syncthreads();
    const float4 v = ring[i % 3 * 32 + (threadIdx.x + 5) % 32];
    sum += v.x + v.y + v.z + v.w;
    __syncthreads();
  }
  ptx::cp_async_wait<0>();
  out[threadIdx.x] = sum;
}

void copies_are_there_once_they_were_waited_for() {
  std::vector<float> in(7 * 128), out(32);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i % 13);
  EXPECT(launch(ring_kernel, 1, 32, 3 * 32 * 16, nullptr, in.data(), out.data(), 7) == cudaSuccess);
  for (size_t t = 0; t < 32; ++t) {
    float sum = 0;
    for (size_t i = 0; i < 7 * 4; ++i) sum += in[i / 4 * 128 + (t + 5) % 32 * 4 + i % 4];
    EXPECT(out[t] == sum);
  }
}

}  // namespace

int main() {
  RUN(every_thread_of_every_block_runs_once);
  RUN(barriers_order_what_threads_see<float>);
  RUN(barriers_order_what_threads_see<uint8_t>);
#if !defined(PEFTKERN_RACES)
  RUN(shared_memory_starts_as_nan_in_every_block);
#endif
  RUN(the_seed_decides_who_goes_first);
  RUN(a_launch_beyond_the_limits_is_an_error);
  RUN(a_kernels_own_shared_memory_counts);
  RUN(atomics_lose_nothing);
  RUN(threads_may_leave_where_no_barrier_follows);
  RUN(copies_are_there_once_they_were_waited_for);
}
