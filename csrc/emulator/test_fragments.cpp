// ldmatrix and mma against an independent statement: the index formulas of the PTX manual
// ("Matrix fragments for mma.m16n8k16 with floating point type", "ldmatrix"), element by element as
// they stand there. The emulator was written the other way round, from the matrices to the lanes;
// so neither can repeat a misreading of the other.
#include <cmath>
#include <functional>
#include <vector>

#include "common/launch.h"
#include "common/ptx.h"
#include "common/testing.h"

using namespace peftkern;

namespace {

struct Place {
  int row, column;
};

// groupID = %laneid >> 2, threadID_in_group = %laneid % 4; `i`: the element's number in the vector
// of elements that a lane holds.
Place in_a(int lane, int i) {  // a0 ... a7
  const int group = lane >> 2, thread = lane % 4;
  const int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8;
  const int column = i < 4 ? thread * 2 + (i & 1) : thread * 2 + (i & 1) + 8;
  return {row, column};
}
Place in_b(int lane, int i) {  // b0 ... b3
  const int group = lane >> 2, thread = lane % 4;
  return {i < 2 ? thread * 2 + (i & 1) : thread * 2 + (i & 1) + 8, group};
}
Place in_c(int lane, int i) {  // c0 ... c3
  const int group = lane >> 2, thread = lane % 4;
  return {i < 2 ? group : group + 8, thread * 2 + (i & 1)};
}

template <typename T>
__global__ void multiply_kernel(const uint32_t* a, const uint32_t* b, float* d) {
  const unsigned lane = threadIdx.x;
  uint32_t fragment_a[4], fragment_b[2];
  float fragment_d[4];
  for (unsigned i = 0; i < 4; ++i) fragment_a[i] = a[lane * 4 + i];
  for (unsigned i = 0; i < 2; ++i) fragment_b[i] = b[lane * 2 + i];
  for (unsigned i = 0; i < 4; ++i) fragment_d[i] = d[lane * 4 + i];
  ptx::mma_m16n8k16(fragment_d, fragment_a, fragment_b, T{});
  for (unsigned i = 0; i < 4; ++i) d[lane * 4 + i] = fragment_d[i];
}

uint16_t bits_of(float value, bf16) { return emulator::to_bf16(value); }
uint16_t bits_of(float value, fp16) { return emulator::to_fp16(value); }

// Whole numbers, so that every order of the sum is exact.
float number(int i) { return static_cast<float>(i * 73 % 23 - 11); }

using Layout = std::function<Place(int, int)>;

template <typename T>
bool is_the_product(const Layout& a_layout) {
  std::vector<uint16_t> a(32 * 8), b(32 * 4);
  std::vector<uint32_t> a_words(32 * 4), b_words(32 * 2);
  std::vector<float> d(32 * 4);
  const auto a_at = [](int row, int column) { return number(row * 16 + column); };
  const auto b_at = [](int row, int column) { return number(1000 + row * 8 + column); };
  const auto c_at = [](int row, int column) { return number(2000 + row * 8 + column); };
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) {
      const Place at = a_layout(lane, i);
      a_words[static_cast<size_t>(lane * 4 + i / 2)] |=
          uint32_t{bits_of(a_at(at.row, at.column), T{})} << 16 * (i % 2);
    }
    for (int i = 0; i < 4; ++i) {
      const Place at = in_b(lane, i), of_c = in_c(lane, i);
      b_words[static_cast<size_t>(lane * 2 + i / 2)] |=
          uint32_t{bits_of(b_at(at.row, at.column), T{})} << 16 * (i % 2);
      d[static_cast<size_t>(lane * 4 + i)] = c_at(of_c.row, of_c.column);
    }
  }
  EXPECT(launch(multiply_kernel<T>, 1, 32, 0, nullptr, a_words.data(), b_words.data(), d.data()) ==
         cudaSuccess);
  bool same = true;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const Place at = in_c(lane, i);
      float wanted = c_at(at.row, at.column);
      for (int k = 0; k < 16; ++k) wanted += a_at(at.row, k) * b_at(k, at.column);
      same &= d[static_cast<size_t>(lane * 4 + i)] == wanted;
    }
  }
  return same;
}

void mma_is_the_product_of_its_fragments() {
  EXPECT(is_the_product<bf16>(in_a));
  EXPECT(is_the_product<fp16>(in_a));
}

// A planted bug: the second and third register of a changed places.
void a_wrong_fragment_is_a_wrong_product() {
  const Layout wrong = [](int lane, int i) {
    return in_a(lane, i / 2 == 1 || i / 2 == 2 ? i ^ 6 : i);
  };
  EXPECT(!is_the_product<bf16>(wrong));
  EXPECT(!is_the_product<fp16>(wrong));
}

enum class Kind { x2, x4, x4_transposed };

template <Kind kKind>
__global__ void load_kernel(const uint16_t* in, uint32_t* out) {
  constexpr unsigned kMatrices = kKind == Kind::x2 ? 2 : 4;
  alignas(16) __shared__ uint16_t x[4][8][8];
  const unsigned lane = threadIdx.x;
  for (unsigned i = lane; i < 256; i += 32) x[i / 64][i / 8 % 8][i % 8] = in[i];
  __syncthreads();
  uint32_t words[4] = {};
  if constexpr (kKind == Kind::x2) {
    ptx::ldmatrix_x2(*reinterpret_cast<uint32_t (*)[2]>(words), x[lane / 8 % 2][lane % 8]);
  } else if constexpr (kKind == Kind::x4) {
    ptx::ldmatrix_x4(words, x[lane / 8][lane % 8]);
  } else {
    ptx::ldmatrix_x4_trans(words, x[lane / 8][lane % 8]);
  }
  for (unsigned i = 0; i < kMatrices; ++i) out[lane * 4 + i] = words[i];
}

// The manual: thread T holds of each matrix row T / 4, elements 2 (T % 4) and + 1; transposed, the
// matrix is loaded in column-major format.
template <Kind kKind>
void rows_go_to_the_lanes_of_the_manual() {
  std::vector<uint16_t> in(256);
  for (size_t i = 0; i < 256; ++i) in[i] = static_cast<uint16_t>(i);
  std::vector<uint32_t> out(128, 0xFFFFFFFFu);
  EXPECT(launch(load_kernel<kKind>, 1, 32, 0, nullptr, in.data(), out.data()) == cudaSuccess);
  for (uint32_t t = 0; t < 32; ++t) {
    for (uint32_t m = 0; m < (kKind == Kind::x2 ? 2u : 4u); ++m) {
      const uint32_t row = t / 4, element = 2 * (t % 4);
      const bool transposed = kKind == Kind::x4_transposed;
      const uint32_t low = m * 64 + (transposed ? element * 8 + row : row * 8 + element);
      EXPECT(out[t * 4 + m] == (low | (low + (transposed ? 8 : 1)) << 16));
    }
  }
}

}  // namespace

int main() {
  RUN(mma_is_the_product_of_its_fragments);
  RUN(a_wrong_fragment_is_a_wrong_product);
  RUN(rows_go_to_the_lanes_of_the_manual<Kind::x2>);
  RUN(rows_go_to_the_lanes_of_the_manual<Kind::x4>);
  RUN(rows_go_to_the_lanes_of_the_manual<Kind::x4_transposed>);
}
