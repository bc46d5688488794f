// One read loop and one write loop, as fast as memory is with the instruction set at hand.
#include "bench/bench.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace peftkern::bench::PEFTKERN_ISA {
namespace {

// A plain sum: the compiler unrolls and vectorises it, and memory is slower than the additions.
uint64_t read(const uint64_t* buffer, int64_t words) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < words; ++i) sum += buffer[i];
  return sum;
}

// Stores around the caches: an ordinary store first reads the line it is about to overwrite, which
// would halve what is measured.
void write(uint64_t* buffer, int64_t words) {
  int64_t i = 0;
#if defined(__AVX512F__)
  using Vector = __m512i;
  const Vector fill = _mm512_set1_epi64(static_cast<int64_t>(kFill));
  const auto stream = [](uint64_t* at, Vector v) {
    _mm512_stream_si512(reinterpret_cast<Vector*>(at), v);
  };
#elif defined(__AVX2__)
  using Vector = __m256i;
  const Vector fill = _mm256_set1_epi64x(static_cast<int64_t>(kFill));
  const auto stream = [](uint64_t* at, Vector v) {
    _mm256_stream_si256(reinterpret_cast<Vector*>(at), v);
  };
#elif defined(__SSE2__)
  using Vector = __m128i;
  const Vector fill = _mm_set1_epi64x(static_cast<int64_t>(kFill));
  const auto stream = [](uint64_t* at, Vector v) {
    _mm_stream_si128(reinterpret_cast<Vector*>(at), v);
  };
#endif
#if defined(__SSE2__)
  constexpr int64_t step = sizeof(Vector) / sizeof(uint64_t);
  while (i < words && reinterpret_cast<uintptr_t>(buffer + i) % sizeof(Vector) != 0)
    buffer[i++] = kFill;
  for (; i + step <= words; i += step) stream(buffer + i, fill);
  _mm_sfence();  // streaming stores are ordered by nothing else, and the caller's threads meet next
#endif
  for (; i < words; ++i) buffer[i] = kFill;
}

}  // namespace

extern const Table table;
const Table table{read, write};

}  // namespace peftkern::bench::PEFTKERN_ISA
