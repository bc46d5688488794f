// The ops bench_read and bench_write: the floors, over torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>

#include "bench/bench.h"
#include "common/isa.h"

namespace peftkern::bench {
namespace {

using torch::stable::Tensor;

// A thread gets 256 KiB at least: less is over before the thread has started.
constexpr int64_t kGrain = 32768;

int64_t words_of(const Tensor& buffer) {
  const int64_t bytes = buffer.numel() * static_cast<int64_t>(buffer.element_size());
  STD_TORCH_CHECK(buffer.is_contiguous(), "buffer must be dense");
  STD_TORCH_CHECK(bytes % 8 == 0, "buffer must hold a multiple of 8 bytes, got ", bytes);
  return bytes / 8;
}

Tensor read(const Tensor& buffer) {
  const int64_t words = words_of(buffer);
  const auto* source = static_cast<const uint64_t*>(buffer.const_data_ptr());
  const Table& table = PEFTKERN_SELECT(table);
  std::atomic<uint64_t> sum{0};
  torch::stable::parallel_for(0, words, kGrain, [&](int64_t begin, int64_t end) {
    sum += table.read(source + begin, end - begin);
  });
  Tensor out = torch::stable::new_empty(buffer, {1}, torch::headeronly::ScalarType::Long);
  *static_cast<uint64_t*>(out.mutable_data_ptr()) = sum;
  return out;
}

void write(const Tensor& buffer) {
  const int64_t words = words_of(buffer);
  auto* target = static_cast<uint64_t*>(buffer.mutable_data_ptr());
  const Table& table = PEFTKERN_SELECT(table);
  torch::stable::parallel_for(0, words, kGrain, [&](int64_t begin, int64_t end) {
    table.write(target + begin, end - begin);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftkern, CPU, m) {
  m.impl("bench_read", TORCH_BOX(&read));
  m.impl("bench_write", TORCH_BOX(&write));
}

}  // namespace peftkern::bench
