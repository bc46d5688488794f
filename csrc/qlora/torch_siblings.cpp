// The binding of linears that read one x: a pass over it, and one gradient of it.
#include "qlora/backward.h"
#include "qlora/forward.h"

namespace peftkern::qlora {
namespace {

// The problems, out of lists with an entry for each; `layouts` has six numbers for each: how many
// of the weights' tensors are its own, and its layout.
std::vector<Problem> problems_of(
    const MaybeTensor& x, const Tensor& like, const std::vector<Tensor>& weights,
    const std::vector<int64_t>& layouts, const std::vector<MaybeTensor>& biases,
    const std::vector<Tensor>& lora_a, const std::vector<Tensor>& lora_b,
    const std::vector<double>& scales, double dropout, const std::vector<Tensor>& seeds) {
  const size_t count = scales.size();
  STD_TORCH_CHECK(layouts.size() == 6 * count && biases.size() == count && lora_a.size() == count &&
                      lora_b.size() == count && seeds.size() == (dropout > 0 ? count : 0),
                  "siblings must have an entry in every list");
  std::vector<Problem> problems;
  problems.reserve(count);
  auto tensor = weights.begin();
  for (size_t i = 0; i < count; ++i) {
    const int64_t* layout = &layouts[6 * i];
    STD_TORCH_CHECK(layout[0] >= 0 && layout[0] <= weights.end() - tensor,
                    "layouts must count the weights' tensors");
    const std::vector<Tensor> weight(tensor, tensor + layout[0]);
    tensor += layout[0];
    const MaybeTensor seed = dropout > 0 ? MaybeTensor(seeds[i]) : std::nullopt;
    problems.emplace_back(x, like, weight, std::vector<int64_t>(layout + 1, layout + 6), biases[i],
                          lora_a[i], lora_b[i], scales[i], dropout, seed, std::nullopt,
                          std::nullopt);
    STD_TORCH_CHECK(problems[i].base.columns == problems[0].base.columns,
                    "siblings must read one x");
  }
  return problems;
}

}  // namespace

// y of each, then down of each.
std::vector<Tensor> siblings(const Tensor& x, std::vector<Tensor> weights,
                             std::vector<int64_t> layouts, std::vector<MaybeTensor> biases,
                             std::vector<Tensor> lora_a, std::vector<Tensor> lora_b,
                             std::vector<double> scales, double dropout,
                             std::vector<Tensor> seeds) {
  const std::vector<Problem> problems =
      problems_of(x, x, weights, layouts, biases, lora_a, lora_b, scales, dropout, seeds);
  std::vector<Tensor> out;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  for (const Problem& p : problems) {
    shape.back() = p.base.rows;
    out.push_back(empty(shape, p.x.dtype));
  }
  std::vector<Forward> passes;
  for (size_t i = 0; i < problems.size(); ++i) {
    const Problem& p = problems[i];
    out.push_back(empty({p.x.rows, p.rank}, p.sums));
    passes.push_back(
        {p, Matrix::of(out[i], p.x.rows, p.base.rows), Matrix::of(out.back(), p.x.rows, p.rank)});
  }
  forward(passes);
  return out;
}

// `needs`: x, then bias, lora_a, lora_b of each. Only what is needed is returned.
std::vector<Tensor> siblings_bwd(std::vector<Tensor> grads, const MaybeTensor& x,
                                 std::vector<Tensor> downs, std::vector<Tensor> weights,
                                 std::vector<int64_t> layouts, std::vector<MaybeTensor> biases,
                                 std::vector<Tensor> lora_a, std::vector<Tensor> lora_b,
                                 std::vector<double> scales, double dropout,
                                 std::vector<Tensor> seeds, std::vector<bool> needs) {
  const std::vector<Problem> problems =
      problems_of(x, grads.at(0), weights, layouts, biases, lora_a, lora_b, scales, dropout, seeds);
  STD_TORCH_CHECK(grads.size() == problems.size() && downs.size() == problems.size() &&
                      needs.size() == 3 * problems.size() + 1,
                  "siblings must have an entry in every list");
  Scratch scratch;
  std::vector<Tensor> out;
  Gradients gradients(scratch, out);
  const Matrix grad_x = needs[0] ? gradients.of_x(grads[0], problems[0]) : Matrix{};
  std::vector<Backward> passes;
  for (size_t i = 0; i < problems.size(); ++i) {
    const Problem& p = problems[i];
    check_count(grads[i], "grads", p.x.rows * p.base.rows);
    check_dtype(grads[i], "grads", p.x.dtype);
    check_count(downs[i], "downs", p.x.rows * p.rank);
    check_dtype(downs[i], "downs", p.sums);
    const bool need_a = needs[3 * i + 2];
    STD_TORCH_CHECK(x || !need_a, "x must come where a gradient needs it");
    Backward pass{
        p, Matrix::of(grads[i], p.x.rows, p.base.rows), Matrix::of(downs[i], p.x.rows, p.rank), {}};
    if (needs[3 * i + 1] && biases[i])
      pass.sums.bias = gradients.of(*biases[i], p.sums, 1, p.base.rows);
    if (need_a) pass.sums.a = gradients.of(lora_a[i], p.sums, p.rank, p.base.columns);
    if (needs[3 * i + 3]) pass.sums.b = gradients.of(lora_b[i], p.sums, p.base.rows, p.rank);
    if (needs[0] || need_a) pass.sums.t = Sums::zeros(p.x.rows, p.rank, p.sums, scratch);
    passes.push_back(pass);
  }
  backward(passes, grad_x);
  gradients.round();
  return out;
}

PEFTKERN_OPS(CPU, m) {
  m.impl("qlora_siblings", TORCH_BOX(&siblings));
  m.impl("qlora_siblings_bwd", TORCH_BOX(&siblings_bwd));
}

}  // namespace peftkern::qlora
