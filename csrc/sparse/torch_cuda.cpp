// The binding of the CUDA kernels: the gradient of few values.
#include "common/cuda_binding.h"
#include "sparse/sparse_cuda.h"

namespace peftkern::sparse {
namespace {

// A csr of an op's arguments. What it says lies on the device, and is not looked at.
Pattern csr_of(const CudaScope& scope, const std::vector<Tensor>& tensors,
               const std::vector<int64_t>& layout) {
  STD_TORCH_CHECK(tensors.size() == 2 && layout.size() == 4 && layout[0] == 0,
                  "pattern must be the two tensors of a csr, and its layout four numbers");
  const int64_t rows = layout[1], columns = layout[2], nnz = layout[3];
  STD_TORCH_CHECK(std::min({rows, columns, nnz}) >= 0,
                  "layout must be a kind, rows, columns and a number of entries");
  STD_TORCH_CHECK(nnz == 0 || rows + columns <= kMostRows, "pattern must have at most ", kMostRows,
                  " rows and columns in all");
  const bool wide = nnz >= int64_t{1} << 31;
  check_count(scope, tensors[0], "row_start", rows + 1);
  check_dtype(tensors[0], "row_start", wide ? ScalarType::Long : ScalarType::Int);
  check_count(scope, tensors[1], "columns", nnz);
  check_dtype(tensors[1], "columns", is_small(columns) ? ScalarType::UInt16 : ScalarType::Int);
  return {false, rows, columns, nnz, tensors[1].const_data_ptr(), tensors[0].const_data_ptr(),
          wide};
}

template <typename T>
cudaError_t run(const CudaScope& scope, const Pattern& csr, const Tensor& x, const Tensor& grad,
                const Sampled<float>& io) {
  const auto operand = [](const Tensor& tensor) {
    const auto strides = tensor.strides();
    return Operand<T>{static_cast<const T*>(tensor.const_data_ptr()), strides[0], strides[1]};
  };
  const int64_t length = sddmm_length(csr.rows + csr.columns, io.tokens, sizeof(T));
  const int64_t floats = (csr.rows + csr.columns) * length * static_cast<int64_t>(sizeof(T)) / 4;
  const Tensor workspace = scope.empty({floats}, ScalarType::Float);
  return sddmm_cuda(csr, operand(x), operand(grad), io, workspace.mutable_data_ptr(), length,
                    scope.stream);
}

void sample(Tensor values, const Tensor& x, const Tensor& grad, std::vector<Tensor> tensors,
            std::vector<int64_t> layout, double scale, bool add) {
  const CudaScope scope(x);
  const Pattern csr = csr_of(scope, tensors, layout);
  check_count(scope, values, "values", csr.nnz);
  check_dtype(values, "values", ScalarType::Float);
  STD_TORCH_CHECK(scope.holds(grad), "grad must be on the device of the other operands");
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "grad must be of x's dtype");
  STD_TORCH_CHECK(x.dim() == 2 && grad.dim() == 2 && x.size(0) == grad.size(0) &&
                      x.size(1) == csr.columns && grad.size(1) == csr.rows,
                  "x and grad must be matrices of as many rows and of the pattern's width");
  if (csr.nnz == 0) return;
  const Sampled<float> io{x.size(0), static_cast<float>(scale), add,
                          values.mutable_data_ptr<float>()};
  cudaError_t status{};
  switch (x.scalar_type()) {
    case ScalarType::Float:
      status = run<float>(scope, csr, x, grad, io);
      break;
    case ScalarType::BFloat16:
      status = run<bf16>(scope, csr, x, grad, io);
      break;
    default:
      STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half,
                      "x must be float32, bfloat16 or float16");
      status = run<fp16>(scope, csr, x, grad, io);
  }
  check_status(status, "sparse_sample_");
}

}  // namespace

PEFTKERN_CUDA_OPS(m) {
  if (!torch_has_cuda()) return;
  m.impl("sparse_sample_", TORCH_BOX(&sample));
}

}  // namespace peftkern::sparse
