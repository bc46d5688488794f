// What each instruction of common/ptx.h makes of numbers drawn at random, printed as words in hex:
// a line for each instruction, which `bench/device.sh` has compiled by nvcc and for the emulator,
// and compares. Sums are of small whole numbers, so that no order of adding them shows.
#include <cstdio>
#include <cstring>
#include <iterator>
#include <new>
#include <random>
#include <vector>

#include "common/launch.h"
#include "common/ptx.h"

using namespace peftkern;

namespace {

constexpr int kLanes = 32;
constexpr int kIn = 32;  // words a lane is given
constexpr int kOut = 4;  // words a lane gives back

using Words = std::vector<uint32_t>;

template <int kMatrices, bool kTransposed>
__global__ void load_matrices_kernel(const uint32_t* in, uint32_t* out) {
  alignas(16) __shared__ uint32_t x[kLanes * 4];
  const unsigned lane = threadIdx.x;
  for (unsigned i = 0; i < 4; ++i) x[i * kLanes + lane] = in[i * kLanes + lane];
  __syncwarp();
  uint32_t words[4] = {};
  // Rows in another order than they lie in, so that an address counts and not a lane.
  const void* row = &x[4 * ((lane * 5 + 3) % kLanes)];
  if constexpr (kMatrices == 2) {
    uint32_t two[2];
    ptx::ldmatrix_x2(two, row);
    words[0] = two[0], words[1] = two[1];
  } else if constexpr (kTransposed) {
    ptx::ldmatrix_x4_trans(words, row);
  } else {
    ptx::ldmatrix_x4(words, row);
  }
  for (unsigned i = 0; i < 4; ++i) out[lane * kOut + i] = words[i];
}

__device__ inline uint32_t pack(float low, float high, bf16) { return ptx::pack_bf16x2(low, high); }
__device__ inline uint32_t pack(float low, float high, fp16) { return ptx::pack_fp16x2(low, high); }

// From -8 to 7.
__device__ inline float whole(uint32_t word) { return static_cast<float>(word % 16) - 8.0f; }

template <typename T>
__global__ void multiply_kernel(const uint32_t* in, uint32_t* out) {
  const uint32_t* mine = in + threadIdx.x * kIn;
  uint32_t a[4], b[2];
  float d[4];
  for (unsigned i = 0; i < 4; ++i) a[i] = pack(whole(mine[2 * i]), whole(mine[2 * i + 1]), T{});
  for (unsigned i = 4; i < 6; ++i) b[i - 4] = pack(whole(mine[2 * i]), whole(mine[2 * i + 1]), T{});
  for (unsigned i = 0; i < 4; ++i) d[i] = whole(mine[12 + i]);
  ptx::mma_m16n8k16(d, a, b, T{});
  for (unsigned i = 0; i < 4; ++i) memcpy(&out[threadIdx.x * kOut + i], &d[i], 4);
}

// Two groups are under way at once, every third copy is of zeros, and the lanes read what others
// have copied.
__global__ void copy_kernel(const uint32_t* in, uint32_t* out) {
  alignas(16) __shared__ uint32_t x[2][kLanes * 4];
  const unsigned lane = threadIdx.x;
  for (unsigned stage = 0; stage < 2; ++stage) {
    for (unsigned i = 0; i < 4; ++i) x[stage][lane * 4 + i] = 0xDEADBEEFu;
  }
  __syncwarp();
  for (unsigned stage = 0; stage < 2; ++stage) {
    ptx::cp_async_16(&x[stage][lane * 4], in + (stage * kLanes + lane) * 4, lane % 3 != stage);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<1>();
  __syncwarp();
  const unsigned other = (lane * 7 + 1) % kLanes;
  uint32_t sum[4];
  for (unsigned i = 0; i < 4; ++i) sum[i] = x[0][other * 4 + i];
  ptx::cp_async_wait<0>();
  __syncwarp();
  for (unsigned i = 0; i < 4; ++i) out[lane * kOut + i] = sum[i] ^ x[1][other * 4 + i] << 1;
}

// Every bit pattern may come, NaN and subnormal numbers among them: a NaN's bits are its maker's
// business, so it counts as one.
__device__ inline uint32_t known(uint32_t half, uint32_t exponent) {
  return (half & exponent) == exponent && (half & (0x7FFFu ^ exponent)) ? 0xFFFFu : half;
}

template <bool kBf16>
__global__ void pack_kernel(const uint32_t* in, uint32_t* out) {
  for (unsigned i = 0; i < kOut; ++i) {
    float low, high;
    memcpy(&low, &in[threadIdx.x * kIn + 2 * i], 4);
    memcpy(&high, &in[threadIdx.x * kIn + 2 * i + 1], 4);
    const uint32_t word = kBf16 ? ptx::pack_bf16x2(low, high) : ptx::pack_fp16x2(low, high);
    const uint32_t exponent = kBf16 ? 0x7F80u : 0x7C00u;
    out[threadIdx.x * kOut + i] = known(word & 0xFFFFu, exponent) | known(word >> 16, exponent)
                                                                        << 16;
  }
}

__global__ void to_float_kernel(const uint32_t* in, uint32_t* out) {
  for (unsigned i = 0; i < kOut; ++i) {
    const float value = ptx::to_float(fp16{static_cast<uint16_t>(in[threadIdx.x * kIn + i])});
    uint32_t word;
    memcpy(&word, &value, 4);
    out[threadIdx.x * kOut + i] = value == value ? word : 0x7FFFFFFFu;
  }
}

__global__ void words_kernel(const uint32_t* in, uint32_t* out) {
  const uint32_t* mine = in + threadIdx.x * kIn;
  const uint4 loaded = ptx::load_streaming(reinterpret_cast<const uint4*>(mine));
  out[threadIdx.x * kOut] = loaded.x ^ loaded.y << 1;
  out[threadIdx.x * kOut + 1] = loaded.z ^ loaded.w << 1;
  out[threadIdx.x * kOut + 2] = ptx::and_or(mine[0], mine[1], mine[2]);
  out[threadIdx.x * kOut + 3] = ptx::and_or(mine[3], mine[4], mine[5]);
}

// Memory that a kernel can reach, and the way there and back.
#if defined(PEFTKERN_EMULATED)
uint32_t* allocate(size_t words) { return new (std::align_val_t{256}) uint32_t[words]; }
void copy(uint32_t* to, const uint32_t* from, size_t words, bool) {
  std::memcpy(to, from, 4 * words);
}
cudaError_t finish() { return cudaSuccess; }
#else
uint32_t* allocate(size_t words) {
  void* out = nullptr;
  return cudaMalloc(&out, 4 * words) == cudaSuccess ? static_cast<uint32_t*>(out) : nullptr;
}
void copy(uint32_t* to, const uint32_t* from, size_t words, bool there) {
  cudaMemcpy(to, from, 4 * words, there ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost);
}
cudaError_t finish() { return cudaDeviceSynchronize(); }
#endif

bool show(const char* name, void (*kernel)(const uint32_t*, uint32_t*), const Words& in) {
  Words out(kLanes * kOut);
  uint32_t *there = allocate(in.size()), *back = allocate(out.size());
  if (!there || !back) {
    std::fprintf(stderr, "%s: no memory on the device\n", name);
    return false;
  }
  copy(there, in.data(), in.size(), true);
  copy(back, out.data(), out.size(), true);
  cudaError_t status = launch(kernel, dim3(1), dim3(kLanes), 0, nullptr, there, back);
  if (status == cudaSuccess) status = finish();
  if (status != cudaSuccess) {
    std::fprintf(stderr, "%s: %s\n", name, cudaGetErrorString(status));
    return false;
  }
  copy(out.data(), back, out.size(), false);
  std::printf("%s", name);
  for (const uint32_t word : out) std::printf(" %08x", word);
  std::printf("\n");
  return true;
}

}  // namespace

int main() {
  std::mt19937 draw(7);
  bool good = true;
  for (int round = 0; round < 20; ++round) {
    Words in(kLanes * kIn);
    for (uint32_t& word : in) word = static_cast<uint32_t>(draw());
    // Ties and the edges of what 16 bits hold, which hardly ever come by chance.
    const uint32_t edges[] = {0x3F808000u, 0x3F818000u, 0x477FF000u, 0x33000000u, 0x33000001u,
                              0x7F7FFFFFu, 0x00400000u, 0x38001000u, 0x387FE000u, 0x7F800000u};
    for (uint32_t i = 0; i < std::size(edges); ++i) in[kIn * i] = edges[i] ^ draw() % 2 << 31;
    good &= show("ldmatrix.x2", load_matrices_kernel<2, false>, in);
    good &= show("ldmatrix.x4", load_matrices_kernel<4, false>, in);
    good &= show("ldmatrix.x4.trans", load_matrices_kernel<4, true>, in);
    good &= show("mma.bf16", multiply_kernel<bf16>, in);
    good &= show("mma.fp16", multiply_kernel<fp16>, in);
    good &= show("cp.async", copy_kernel, in);
    good &= show("cvt.bf16x2", pack_kernel<true>, in);
    good &= show("cvt.f16x2", pack_kernel<false>, in);
    good &= show("cvt.f32.f16", to_float_kernel, in);
    good &= show("lop3, ld.global", words_kernel, in);
  }
  return good ? 0 : 1;
}
