// Planted bugs of order: a barrier that is missing, a copy that nobody waited for. The race
// detector names them; without it they show in what comes out, since no order of threads is kept
// to.
#include <cmath>
#include <vector>

#include "common/launch.h"
#include "common/ptx.h"
#include "common/testing.h"
#include "emulator/dies.h"

using namespace peftkern;
using namespace peftkern::emulator;

namespace {

LINE(kUnordered);
__global__ void unordered_kernel(const float* in, float* out) {
  __shared__ float x[64];
  x[threadIdx.x] = 0;
  __syncthreads();
  x[threadIdx.x] = in[threadIdx.x];        // kUnordered + 5
  out[threadIdx.x] = x[63 - threadIdx.x];  // kUnordered + 6
}

__global__ void unordered_bytes_kernel(int* out) {
  __shared__ uint8_t x[64];
  x[threadIdx.x] = 1;  // neighbours in a word do not meet
  if (threadIdx.x == 63) x[0] = 2;
  __syncthreads();
  out[threadIdx.x] = x[threadIdx.x];
}

__global__ void half_ordered_kernel(int* out) {
  __shared__ int x[64];
  x[threadIdx.x] = 1;
  __syncwarp();  // of one's own warp, which is not where one reads
  out[threadIdx.x] = x[threadIdx.x ^ 32];
}

__global__ void half_atomic_kernel(int* out) {
  __shared__ int x[1];
  if (threadIdx.x == 0) x[0] = 0;
  atomicAdd(x, 1);
  __syncthreads();
  out[threadIdx.x] = x[0];
}

__global__ void unwritten_kernel(float* out) {
  __shared__ float x[64];
  if (threadIdx.x < 63) x[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = x[63 - threadIdx.x];
}

void a_missing_barrier() {
  std::vector<float> in(64), out(64);
  for (size_t i = 0; i < 64; ++i) in[i] = static_cast<float>(i);
  if (kRaces) {
    EXPECT_DIES(launch(unordered_kernel, 1, 64, 0, nullptr, in.data(), out.data()),
                "of shared x at ", at(kUnordered + 5), at(kUnordered + 6),
                "with no barrier between", "writes", "reads");
    std::vector<int> numbers(64);
    EXPECT_DIES(launch(unordered_bytes_kernel, 1, 64, 0, nullptr, numbers.data()),
                "writes bytes 0 to 0 of shared x at ", "with no barrier between");
    EXPECT_DIES(launch(half_ordered_kernel, 1, 64, 0, nullptr, numbers.data()), "of shared x at ");
    EXPECT_DIES(launch(half_atomic_kernel, 1, 64, 0, nullptr, numbers.data()), "of shared x at ");
    EXPECT_DIES(launch(unwritten_kernel, 1, 64, 0, nullptr, out.data()),
                "reads bytes 252 to 255 of shared x at ", "which nobody has written");
    return;
  }
  EXPECT(launch(unordered_kernel, 1, 64, 0, nullptr, in.data(), out.data()) == cudaSuccess);
  EXPECT(out != std::vector<float>(in.rbegin(), in.rend()));
  EXPECT(launch(unwritten_kernel, 1, 64, 0, nullptr, out.data()) == cudaSuccess);
  EXPECT(std::isnan(out[0]) && out[1] == 1);
}

template <int kPending>
__global__ void early_kernel(const float* in, float* out) {
  auto* x = static_cast<float*>(ptx::dynamic_shared());
  x[threadIdx.x * 8] = x[threadIdx.x * 8 + 4] = 0;
  ptx::cp_async_16(x + threadIdx.x * 8, in, true);
  ptx::cp_async_commit();
  ptx::cp_async_16(x + threadIdx.x * 8 + 4, in, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<kPending>();
  out[threadIdx.x] = x[threadIdx.x * 8] + x[threadIdx.x * 8 + 4];
}

__global__ void another_kernel(const float* in, float* out) {
  auto* x = static_cast<float4*>(ptx::dynamic_shared());
  ptx::cp_async_16(x + threadIdx.x, in, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();  // and no barrier
  out[threadIdx.x] = x[threadIdx.x ^ 1].x;
}

__global__ void overwritten_kernel(const float* in, float* out) {
  auto* x = static_cast<float4*>(ptx::dynamic_shared());
  x[threadIdx.x] = {1, 1, 1, 1};
  __syncthreads();
  out[threadIdx.x] = x[threadIdx.x ^ 1].x;
  ptx::cp_async_16(x + threadIdx.x, in, true);  // somebody may still read here
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}

void a_read_before_the_copy_was_waited_for() {
  alignas(16) const float in[4] = {1, 2, 3, 4};
  std::vector<float> out(32);
  EXPECT(launch(early_kernel<0>, 1, 32, 1024, nullptr, in, out.data()) == cudaSuccess);
  EXPECT(out == std::vector<float>(32, 2));
  const auto early = [&] { launch(early_kernel<1>, 1, 32, 1024, nullptr, in, out.data()); };
  if (kSanitized) {
    EXPECT_DIES(early(), "use-after-poison", "early_kernel", "test_order.cpp:");
  } else if (kRaces) {
    EXPECT_DIES(early(), "reads bytes ", "which a cp.async of thread (", "has not been waited for",
                "test_order.cpp:");
  } else {
    early();
    EXPECT(std::isnan(out[0]) && std::isnan(out[31]));
  }
  if (!kRaces) return;
  EXPECT_DIES(launch(another_kernel, 1, 32, 512, nullptr, in, out.data()),
              "test_order.cpp:", "of shared dynamic_shared() at ");
  EXPECT_DIES(launch(overwritten_kernel, 1, 32, 512, nullptr, in, out.data()),
              "test_order.cpp:", "with no barrier between");
}

}  // namespace

int main() {
  RUN(a_missing_barrier);
  RUN(a_read_before_the_copy_was_waited_for);
}
