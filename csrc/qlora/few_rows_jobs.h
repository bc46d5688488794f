// Products straight from the packed bytes, over whole matrices; part of the binding.
#pragma once
#include "qlora/problem.h"

namespace peftkern::qlora {

// Products with few rows of x, made ready one by one and run together: to wake the threads costs as
// much as a small product takes.
class FewRowsJobs {
 public:
  explicit FewRowsJobs(Scratch& scratch) : scratch_(scratch) {}

  void add(const Problem& p, const Run& run, const Matrix& down, const Matrix& y) {
    const auto f32 = ScalarType::Float;
    Job job{p.base.of_expert(run.expert), {}, y.part_rows(run.begin, run.end)};
    FewRows& io = job.io;
    io.inputs = run.end - run.begin;
    io.rank = p.rank;
    io.x = laid_out(p.x.part_rows(run.begin, run.end), job.weight);
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
        const bool few = job.io.inputs <= kernels().most_few_rows;
        if (first < last)
          (few ? kernels().few_rows : kernels().tiles)(job.weight, job.io, first, last);
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
    FewRows io;
    Matrix y;
  };
  // Of the last x that was laid out: siblings read the same.
  struct LaidOut {
    const void* x = nullptr;
    int64_t inputs = 0, bits = 0;
    const float* data = nullptr;
  };

  const float* laid_out(const Matrix& x, const Weight& weight) {
    if (x.data == last_.x && x.rows == last_.inputs && weight.bits == last_.bits) return last_.data;
    const int64_t width = kernels().laid_out_width(x.columns);
    const float* from = floats(x);
    float* to = scratch_.take<float>(x.rows * width);
    parallel((x.rows + kGroup - 1) / kGroup, kGroup * width, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin * kGroup; m < std::min(end * kGroup, x.rows); m += kGroup) {
        kernels().lay_out(weight, from + m * x.columns, std::min(kGroup, x.rows - m),
                          to + m * width);
      }
    });
    last_ = {x.data, x.rows, weight.bits, to};
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
