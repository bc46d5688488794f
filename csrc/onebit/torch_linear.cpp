// The bindings of lay_out and of linear on packed codes.
#include "onebit/linear.h"
#include "qlora/base.h"

namespace peftkern::onebit {
namespace {

struct Weight {
  LaidOut codes;
  double mean, scale;

  Weight(const Tensor& laid_out, const Tensor& statistics, int64_t bits, int64_t rows,
         int64_t columns) {
    STD_TORCH_CHECK(is_bits(bits), "bits must be 1, 2 or 4");
    STD_TORCH_CHECK(rows >= 0, "rows must not be negative");
    check_count(laid_out, "laid_out", laid_out_bytes(rows, columns, bits));
    check_dtype(laid_out, "laid_out", ScalarType::Byte);
    check_count(statistics, "statistics", 2);
    double std;
    if (statistics.scalar_type() == ScalarType::Double) {
      const double* found = statistics.const_data_ptr<double>();
      mean = found[0], std = found[1];
    } else {
      check_dtype(statistics, "statistics", ScalarType::Float);
      const float* found = statistics.const_data_ptr<float>();
      mean = found[0], std = found[1];
    }
    codes = {static_cast<const uint8_t*>(laid_out.const_data_ptr()), rows, columns, bits};
    scale = std * unit_of(bits);
  }
};

// Straight from the codes; x and y float. Rows of x are cut too where there are more than one turn
// takes, tiles of W within them: so that tables serve as many tiles as possible.
void by_lookup(const Weight& weight, const Matrix& x, const MaybeTensor& bias, const Matrix& y) {
  constexpr int64_t kTurn = 8;  // rows of x
  Scratch scratch;
  const LaidOut& codes = weight.codes;
  const float* added = nullptr;
  if (bias) {
    const Matrix wide = as_dtype(Matrix::of(*bias, 1, codes.rows), ScalarType::Float, scratch);
    added = static_cast<const float*>(wide.at(0, 0));
  }
  const int64_t tiles = tiles_of(codes.rows), turns = (x.rows + kTurn - 1) / kTurn;
  const int64_t work = std::min(x.rows, kTurn) * words_of(codes.columns, codes.bits) * 8;
  parallel(turns * tiles, work, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t turn = i / tiles, stop = std::min(end, (turn + 1) * tiles);
      const int64_t first = turn * kTurn, last = std::min(first + kTurn, x.rows);
      const Product io{static_cast<const float*>(x.at(first, 0)), added,
                       static_cast<float*>(y.at(first, 0)),       last - first,
                       static_cast<float>(weight.mean),           static_cast<float>(weight.scale)};
      linear_kernels().product(codes, io, i - turn * tiles, stop - turn * tiles);
      i = stop;
    }
  });
}

// y = x L^T by the library, with the levels L in panels that stay in the last-level cache.
template <typename T, typename Sums>
void multiply_panels(const LaidOut& codes, const PanelKernels<T, Sums>& by, const Matrix& x,
                     const Matrix& y) {
  const int64_t size = static_cast<int64_t>(sizeof(T)), words = words_of(codes.columns, codes.bits);
  const int64_t fits = qlora::kPanelBytes / std::max<int64_t>(1, codes.columns * size);
  const int64_t width = std::max<int64_t>(64, fits / 64 * 64);
  Scratch scratch;
  // Rows whose distance is a power of two would fall into the same few places of a cache.
  const int64_t stride = std::min(width, codes.rows) + 16, per_word = 32 / codes.bits;
  T* memory = scratch.take<T>(codes.columns * stride);
  for (int64_t begin = 0; begin < codes.rows; begin += width) {
    const int64_t end = std::min(begin + width, codes.rows);
    parallel(words, per_word * (end - begin), [&](int64_t first, int64_t last) {
      by.panel(codes, {begin, end, first, last, stride}, memory + first * per_word * stride);
    });
    const Matrix panel{reinterpret_cast<char*>(memory), y.dtype, codes.columns, end - begin,
                       stride};
    multiply(y.part(0, y.rows, begin, end), x, panel, 0);
  }
}

// By panels, in the dtype of x and y.
template <typename T, typename Sums>
void by_panels(const Weight& weight, const PanelKernels<T, Sums>& by, const Matrix& x,
               const MaybeTensor& bias, const Matrix& y) {
  if (x.columns) multiply_panels(weight.codes, by, x, y);
  if (x.columns == 0) clear(y);
  Scratch scratch;
  const Sums* added = nullptr;
  if (bias) {
    const auto sums = sizeof(Sums) == 8 ? ScalarType::Double : ScalarType::Float;
    const Matrix wide = as_dtype(Matrix::of(*bias, 1, y.columns), sums, scratch);
    added = static_cast<const Sums*>(wide.at(0, 0));
  }
  parallel(y.rows, x.columns + y.columns, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      by.finish(static_cast<const T*>(x.at(row, 0)), x.columns, weight.mean, weight.scale, added,
                y.columns, static_cast<T*>(y.at(row, 0)));
    }
  });
}

}  // namespace

Tensor lay_out(const Tensor& packed, int64_t bits, int64_t width) {
  STD_TORCH_CHECK(is_bits(bits), "bits must be 1, 2 or 4");
  STD_TORCH_CHECK(packed.dim() == 2 && width >= 0, "packed must have shape [out, bytes]");
  const int64_t rows = packed.size(0);
  check_count(packed, "packed", rows * bytes_of(width, bits));
  check_dtype(packed, "packed", ScalarType::Byte);
  Tensor out = empty({laid_out_bytes(rows, width, bits)}, ScalarType::Byte);
  if (out.numel() == 0) return out;
  ask_for_huge_pages(out.mutable_data_ptr(), out.numel());
  const auto* from = static_cast<const uint8_t*>(packed.const_data_ptr());
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  parallel(tiles_of(rows), kTileRows * words_of(width, bits), [&](int64_t begin, int64_t end) {
    linear_kernels().lay_out(from, rows, width, bits, begin, end, to);
  });
  return out;
}

Tensor linear(const Tensor& x, const Tensor& laid_out, const Tensor& statistics, int64_t bits,
              int64_t rows, const MaybeTensor& bias) {
  STD_TORCH_CHECK(x.dim() > 0, "x must have at least one axis");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  const int64_t columns = shape.back();
  int64_t count = 1;
  for (size_t d = 0; d + 1 < shape.size(); ++d) count *= shape[d];
  check_count(x, "x", count * columns);
  const Weight weight(laid_out, statistics, bits, rows, columns);
  if (bias) check_count(*bias, "bias", rows);
  shape.back() = rows;
  Tensor y = empty(shape, x.scalar_type());
  if (y.numel() == 0) return y;
  const Matrix from = Matrix::of(x, count, columns), to = Matrix::of(y, count, rows);
  if (from.dtype == ScalarType::Double) {
    by_panels(weight, linear_kernels().f64, from, bias, to);
    return y;
  }
  const bool bf16 = from.dtype == ScalarType::BFloat16 && current_isa() >= Isa::avx512bf16;
  if (bf16 && count > linear_kernels().most_bf16.at(bits)) {
    by_panels(weight, linear_kernels().bf16, from, bias, to);
    return y;
  }
  Scratch scratch;
  const bool direct = to.dtype == ScalarType::Float;
  const Matrix wide = as_dtype(from, ScalarType::Float, scratch);
  void* memory = direct ? to.at(0, 0) : scratch.take<float>(count * rows);
  const Matrix out = Matrix::dense(memory, ScalarType::Float, count, rows);
  if (count <= linear_kernels().most.at(bits)) {
    by_lookup(weight, wide, bias, out);
  } else {
    by_panels(weight, linear_kernels().f32, wide, bias, out);
  }
  if (!direct) convert(out, to);
  return y;
}

PEFTKERN_OPS(CPU, m) {
  m.impl("onebit_lay_out", TORCH_BOX(&lay_out));
  m.impl("onebit_linear", TORCH_BOX(&linear));
}

}  // namespace peftkern::onebit
