// Products straight from the packed bytes, over whole matrices; part of the binding.
#pragma once
#include "qlora/problem.h"

namespace peftkern::qlora {

// The kernels for so many rows of x and one expert; none where panels are faster.
inline const FewRowsKernels* few_rows_kernels(const Problem& p, int64_t inputs) {
  // In bf16, what multiplies in float is overtaken early: at 4096 x 4096, 16 rows take 2.1 ms so
  // and 2.8 ms by panels, 24 rows 3.0 and 2.9.
  constexpr int64_t kMostFloatsForBf16 = 16;
  if (p.base.is_dense() || p.sums != ScalarType::Float) return nullptr;
  const bool bf16 = p.product == ScalarType::BFloat16;
  const FewRowsKernels &f32 = kernels().rows_f32, &own = kernels().rows_bf16;
  const Weight& weight = p.base.codes;
  const int64_t most_bf16 = bf16 && own.most ? own.most(weight) : 0;
  if (most_bf16 && inputs > own.most_few_rows) return inputs <= most_bf16 ? &own : nullptr;
  const int64_t most = f32.most(weight);
  return inputs <= (bf16 ? std::min(most, kMostFloatsForBf16) : most) ? &f32 : nullptr;
}

// Products with few rows of x, made ready one by one and run together: to wake the threads costs as
// much as a small product takes.
class FewRowsJobs {
 public:
  explicit FewRowsJobs(Scratch& scratch) : scratch_(scratch) {}

  void add(const Problem& p, const Run& run, const Matrix& down, const Matrix& y) {
    const auto f32 = ScalarType::Float;
    Job job{p.base.of_expert(run.expert),
            few_rows_kernels(p, run.end - run.begin),
            {},
            y.part_rows(run.begin, run.end)};
    FewRows& io = job.io;
    io.inputs = run.end - run.begin;
    io.rank = p.rank;
    io.x = laid_out(p.x.part_rows(run.begin, run.end), job.weight, *job.by);
    const bool direct = y.dtype == f32;
    io.y = direct ? static_cast<float*>(job.y.at(0, 0))
                  : scratch_.take<float>(io.inputs * p.base.rows);
    if (p.bias) io.bias = floats(p.bias_of(run.expert));
    if (run.adapter >= 0) {
      float* scaled = scratch_.take<float>(io.inputs * p.rank);
      const float* from = static_cast<const float*>(down.at(run.begin, 0));
      for (int64_t i = 0; i < io.inputs * p.rank; ++i) {
        scaled[i] = static_cast<float>(p.scale) * from[i];
      }
      io.down = scaled;
      io.lora_b = floats(p.b_of(run.adapter));
    }
    jobs_.push_back(job);
  }

  void run() const {
    int64_t rows = 0, work = 0;
    for (const Job& job : jobs_) {
      rows += job.weight.rows;
      work = std::max(work, job.io.inputs * job.weight.columns / 4);
    }
    parallel(rows, work, [&](int64_t begin, int64_t end) {
      for (const Job& job : jobs_) {
        const int64_t first = std::max<int64_t>(begin, 0), last = std::min(end, job.weight.rows);
        const bool few = job.io.inputs <= job.by->most_few_rows;
        if (first < last) (few ? job.by->few_rows : job.by->tiles)(job.weight, job.io, first, last);
        begin -= job.weight.rows;
        end -= job.weight.rows;
      }
    });
    for (const Job& job : jobs_) {
      if (job.y.dtype == ScalarType::Float) continue;
      convert(Matrix::dense(job.io.y, ScalarType::Float, job.y.rows, job.y.columns), job.y);
    }
  }

 private:
  struct Job {
    Weight weight;
    const FewRowsKernels* by;
    FewRows io;
    Matrix y;
  };
  // Of the last x that was laid out: siblings read the same.
  struct LaidOut {
    const void* x = nullptr;
    int64_t inputs = 0, bits = 0;
    const FewRowsKernels* by = nullptr;
    const void* data = nullptr;
  };

  const void* laid_out(const Matrix& x, const Weight& weight, const FewRowsKernels& by) {
    const bool same = x.data == last_.x && x.rows == last_.inputs && weight.bits == last_.bits;
    if (same && &by == last_.by) return last_.data;
    const auto dtype = &by == &kernels().rows_bf16 ? ScalarType::BFloat16 : ScalarType::Float;
    const void* from = as_dtype(x, dtype, scratch_).at(0, 0);
    void* to = scratch_.take_bytes(by.laid_out(x.rows, x.columns) * size_of(dtype));
    parallel(x.rows, x.columns, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) by.lay_out(weight, from, x.rows, m, to);
    });
    last_ = {x.data, x.rows, weight.bits, &by, to};
    return to;
  }

  const float* floats(const Matrix& matrix) {
    return static_cast<const float*>(as_dtype(matrix, ScalarType::Float, scratch_).at(0, 0));
  }

  Scratch& scratch_;
  std::vector<Job> jobs_;
  LaidOut last_;
};

}  // namespace peftkern::qlora
