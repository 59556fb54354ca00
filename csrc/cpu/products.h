// The steps that products are made of, and the memory between them.
#pragma once

#include "kernels.h"
#include "schedule.h"
#include "workspace.h"

namespace fastattn {

// Groups of tiles that are one part of ClassLoss. Where outputs are cut, it is between parts.
constexpr int64_t kPartGroups = 16;

// Plans products into a schedule. A step is its number in the schedule.
class Products {
 public:
  Products(Type type, int threads);

  float* floats(int64_t n) { return workspace_.floats(n); }
  ProductPlan plan(const Product& p) const { return kernels_.plan(p); }

  // Each adds steps that come after step `after`, and returns the last of them.

  // Packs p.b into p.panels.
  int pack_panels(Product& p, float* panels, int after);
  // Packs p.a and p.gate, where that pays and they are not too large: then `multiply_panels` does.
  int pack_weights(Product& p, int after);
  // Runs p, whose panels are packed.
  int multiply_panels(const Product& p, int after);
  // All of it: in blocks, where a or b is large, so that what is packed stays small.
  int multiply(const Product& whole, int after = Schedule::kNothing);
  // The same where `has_few_tokens(p)`, straight from the weights; p has no slope, no loss, and its
  // output's rows lie side by side.
  int multiply_few(const Product& p, int after = Schedule::kNothing);
  // Rows of b that may be packed at once.
  int64_t block_rows(const Product& p) const;
  void run() { schedule_.run(threads_); }

 private:
  // Outputs whose weights may be packed at once.
  int64_t block_outputs(const Product& p) const;
  int pack_tiles(Product& p, const ProductPlan& plan, float* tiles, float* gate_tiles, int after);

  const ProductKernels& kernels_;
  const int threads_;
  Workspace workspace_;
  Schedule schedule_;
};

bool has_few_tokens(const Product& p);
// Rows [begin, begin + count) of b and of all that goes with them.
Product rows_of(const Product& p, int64_t begin, int64_t count);
// Outputs [begin, begin + count), tokens as they are.
Product outputs_of(const Product& p, int64_t begin, int64_t count);

// [m, n] = x [m, k] weight [n, k]^T; what becomes of it is up to the caller.
Product product_of(Type type, int64_t m, int64_t n, int64_t k, const Matrix& x,
                   const Matrix& weight);
// dx [m, k] = dz [m, n] weight [n, k].
Product input_gradient(Type type, int64_t m, int64_t n, int64_t k, const Matrix& dz,
                       const Matrix& weight, const Matrix& dx);
// dweight [n, k] = dz [m, n]^T x [m, k].
Product weight_gradient(Type type, int64_t m, int64_t n, int64_t k, const Matrix& dz,
                        const Matrix& x, const Matrix& dweight);
// Runs one product, or sums of columns, by itself.
void multiply_now(const Product& p, int threads);
void bwd_rows_now(const LinearParams& p, const Matrix& dout, const Matrix& dz, void* db,
                  int threads);

}  // namespace fastattn
