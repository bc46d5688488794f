// The ops bench_read and bench_write: the floors, over torch's threads.
#include <atomic>

#include "bench/bench.h"
#include "common/binding.h"
#include "common/isa.h"

namespace peftkern::bench {
namespace {

int64_t words_of(const Tensor& buffer) {
  check_dense(buffer, "buffer");
  const int64_t bytes = buffer.numel() * static_cast<int64_t>(buffer.element_size());
  STD_TORCH_CHECK(bytes % 8 == 0, "buffer must hold a multiple of 8 bytes, got ", bytes);
  return bytes / 8;
}

Tensor read(const Tensor& buffer) {
  const int64_t words = words_of(buffer);
  const auto* source = static_cast<const uint64_t*>(buffer.const_data_ptr());
  const Table& table = PEFTKERN_SELECT(table);
  std::atomic<uint64_t> sum{0};
  parallel(words, 1,
           [&](int64_t begin, int64_t end) { sum += table.read(source + begin, end - begin); });
  Tensor out = torch::stable::new_empty(buffer, {1}, ScalarType::Long);
  *static_cast<uint64_t*>(out.mutable_data_ptr()) = sum;
  return out;
}

void write(const Tensor& buffer) {
  const int64_t words = words_of(buffer);
  auto* target = static_cast<uint64_t*>(buffer.mutable_data_ptr());
  const Table& table = PEFTKERN_SELECT(table);
  parallel(words, 1, [&](int64_t begin, int64_t end) { table.write(target + begin, end - begin); });
}

}  // namespace

PEFTKERN_OPS(CPU, m) {
  m.impl("bench_read", TORCH_BOX(&read));
  m.impl("bench_write", TORCH_BOX(&write));
}

}  // namespace peftkern::bench
