#include "products.h"

#include <algorithm>

namespace fastattn {

namespace {

constexpr int64_t kMegabyte = int64_t{1} << 18;  // in floats
// What may be packed at once of b, and of a where all of it is too large.
constexpr int64_t kBlock = 16 * kMegabyte;
// The largest weight that is packed whole.
constexpr int64_t kWhole = 32 * kMegabyte;
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const void* moved(const void* p, int64_t elements, Type type) {
  return p ? static_cast<const char*>(p) + elements * size_of(type) : nullptr;
}

}  // namespace

Product rows_of(const Product& p, int64_t begin, int64_t count) {
  Product part = p;
  part.m = count;
  part.first_row += begin;
  part.b = p.b.from_row(begin, p.type);
  part.finish.pre = p.finish.pre.from_row(begin, p.type);
  part.finish.residual = p.finish.residual.from_row(begin, p.type);
  part.finish.sums = p.finish.sums.from_row(begin, Type::kFloat32);
  part.finish.to_sums = p.finish.to_sums.from_row(begin, Type::kFloat32);
  part.finish.out = p.finish.out.from_row(begin, p.type);
  part.slope.pre = p.slope.pre.from_row(begin, p.type);
  part.slope.hidden = p.slope.hidden.from_row(begin, p.type);
  return part;
}

Product outputs_of(const Product& p, int64_t begin, int64_t count) {
  Product part = p;
  part.n = count;
  part.first_output += begin;
  part.a = p.a.from_row(begin, p.type);
  part.gate = p.gate.from_row(begin, p.type);
  part.finish.bias = moved(p.finish.bias, begin, p.type);
  part.finish.gate_bias = moved(p.finish.gate_bias, begin, p.type);
  part.finish.pre = p.finish.pre.from_column(begin, p.type);
  part.finish.residual = p.finish.residual.from_column(begin, p.type);
  part.finish.sums = p.finish.sums.from_column(begin, Type::kFloat32);
  part.finish.to_sums = p.finish.to_sums.from_column(begin, Type::kFloat32);
  part.finish.out = p.finish.out.from_column(begin, p.type);
  part.slope.pre = p.slope.pre.from_column(begin, p.type);
  part.slope.hidden = p.slope.hidden.from_column(begin, p.type);
  return part;
}

Product product_of(Type type, int64_t m, int64_t n, int64_t k, const Matrix& x,
                   const Matrix& weight) {
  Product p = {};
  p.type = type;
  p.m = m;
  p.n = p.outputs = n;
  p.kk = k;
  p.a = weight;
  p.b = x;
  return p;
}

Product input_gradient(Type type, int64_t m, int64_t n, int64_t k, const Matrix& dz,
                       const Matrix& weight, const Matrix& dx) {
  Product p = product_of(type, m, k, n, dz, weight.transposed());
  p.finish.out = dx;
  return p;
}

Product weight_gradient(Type type, int64_t m, int64_t n, int64_t k, const Matrix& dz,
                        const Matrix& x, const Matrix& dweight) {
  // A panel's lanes are dweight's contiguous dimension.
  const bool across = dweight.column_stride == 1;
  Product p = across ? product_of(type, k, n, m, x.transposed(), dz.transposed())
                     : product_of(type, n, k, m, dz.transposed(), x.transposed());
  p.finish.out = across ? dweight.transposed() : dweight;
  return p;
}

Products::Products(Type type, int threads)
    : kernels_(cpu_kernels().product[static_cast<int>(type)]), threads_(threads) {}

int64_t Products::block_rows(const Product& p) const {
  const ProductPlan plan = kernels_.plan(p);
  const int64_t group = plan.task_panels;
  const int64_t panels = kBlock / std::max<int64_t>(plan.packed_panel, 1) / group * group;
  return std::min(std::max(panels, group) * plan.panel_lanes, p.m);
}

int64_t Products::block_outputs(const Product& p) const {
  const ProductPlan plan = kernels_.plan(p);
  if (!plan.tile_tasks) return std::max<int64_t>(p.n, 1);
  const int64_t part = p.loss.states ? kPartGroups : 1;
  const int64_t groups = std::max<int64_t>(kBlock / plan.packed_group / part, 1) * part;
  return std::min(groups * plan.group * plan.tile_rows, p.n);
}

int Products::pack_panels(Product& p, float* panels, int after) {
  p.panels = panels;
  return schedule_.add(kernels_.plan(p).panel_tasks, after,
                       [this, p, panels](int64_t t) { kernels_.pack_panels(p, t, panels); });
}

int Products::pack_tiles(Product& p, const ProductPlan& plan, float* tiles, float* gate_tiles,
                         int after) {
  const int64_t tasks = plan.tile_tasks;
  p.tiles = tiles;
  p.gate_tiles = gate_tiles;
  const auto pack = [this, p, tasks, tiles, gate_tiles](int64_t t) {
    if (t < tasks) return kernels_.pack_tiles(p, p.a, t, tiles);
    kernels_.pack_tiles(p, p.gate, t - tasks, gate_tiles);
  };
  return schedule_.add(gate_tiles ? 2 * tasks : tasks, after, pack);
}

int Products::pack_weights(Product& p, int after) {
  const ProductPlan plan = kernels_.plan(p);
  const int64_t floats = ceil_div(plan.tiles, plan.group) * plan.packed_group;
  if (plan.tile_tasks == 0 || floats > kWhole) return after;
  float* tiles = workspace_.floats(floats);
  return pack_tiles(p, plan, tiles, p.gate.data ? workspace_.floats(floats) : nullptr, after);
}

int Products::multiply_panels(const Product& p, int after) {
  const ProductPlan plan = kernels_.plan(p);
  const int64_t groups = ceil_div(plan.panels, plan.task_panels);
  // Enough tasks to share them evenly; few enough that a task's tiles reuse the panels in its
  // cache.
  const int64_t tile_groups = ceil_div(plan.tiles, plan.group);
  const int64_t wanted = std::max(ceil_div(int64_t{8} * threads_, groups), tile_groups / 4);
  int64_t parts = std::clamp<int64_t>(wanted, 1, tile_groups);
  // Nobody else adds to what a part knows of the classes.
  const int64_t part_rows = p.loss.part_rows;
  if (p.loss.states) parts = ceil_div(p.n, part_rows);
  const auto run = [this, p, plan, groups, parts, tile_groups, part_rows](int64_t t) {
    const int64_t group = t / parts, part = t % parts;
    ProductTask task;
    task.tile_begin = tile_groups * part / parts * plan.group;
    task.tile_end = std::min(tile_groups * (part + 1) / parts * plan.group, plan.tiles);
    if (part_rows) {
      task.tile_begin = part * part_rows / plan.tile_rows;
      task.tile_end = std::min((part + 1) * part_rows / plan.tile_rows, plan.tiles);
    }
    task.panel_begin = plan.panels * group / groups;
    task.panel_end = plan.panels * (group + 1) / groups;
    kernels_.run(p, task, scratch_buffer().floats(plan.scratch));
  };
  return schedule_.add(groups * parts, after, run);
}

int Products::multiply(const Product& whole, int after) {
  const int64_t rows = block_rows(whole), blocks = ceil_div(whole.m, rows);
  const ProductPlan plan = kernels_.plan(rows_of(whole, 0, rows));
  const int64_t outputs = block_outputs(whole);
  float *tiles = nullptr, *panels[2] = {};
  if (plan.tile_tasks) {
    tiles = workspace_.floats(ceil_div(outputs, plan.group * plan.tile_rows) * plan.packed_group);
  }
  for (int64_t i = 0; i < std::min<int64_t>(blocks, 2); ++i) {
    panels[i] = workspace_.floats(plan.panels * plan.packed_panel);
  }
  for (int64_t n = 0; n < whole.n; n += outputs) {
    Product p = outputs_of(whole, n, std::min(outputs, whole.n - n));
    if (tiles) after = pack_tiles(p, kernels_.plan(p), tiles, nullptr, after);
    // The next block is packed while this one is multiplied: its panels come before.
    int packed[2] = {after, after}, done[2] = {after, after};
    const auto pack = [&](int64_t block) {
      Product part = rows_of(p, block * rows, std::min(rows, p.m - block * rows));
      part.panels = panels[block % 2];
      if (n > 0 && blocks == 1) return part;  // as they were
      packed[block % 2] = std::max(pack_panels(part, panels[block % 2], done[block % 2]), after);
      return part;
    };
    Product next = pack(0);
    for (int64_t block = 0; block < blocks; ++block) {
      const Product part = next;
      if (block + 1 < blocks) next = pack(block + 1);
      done[block % 2] = multiply_panels(part, packed[block % 2]);
    }
    after = schedule_.last();
  }
  return after;
}

int Products::multiply_few(const Product& p, int after) {
  const ProductPlan plan = kernels_.plan(p);
  // Weights that lie across are read in pieces of rows: these should be whole pages.
  const bool across = p.a.column_stride != 1;
  const int64_t part =
      std::max<int64_t>(ceil_div(p.n, int64_t{4} * threads_ * 16) * 16, across ? 256 : 16);
  const int64_t groups = ceil_div(p.m, kFewTokens);
  std::vector<Product> few;
  for (int64_t j = 0; j < p.m; j += kFewTokens) {
    Product group = rows_of(p, j, std::min(kFewTokens, p.m - j));
    float* panels = workspace_.floats(plan.few_panels);
    group.panels = panels;
    schedule_.add(1, after, [this, group, panels](int64_t) { kernels_.pack_few(group, panels); });
    few.push_back(group);
  }
  after = schedule_.last();
  const auto run = [this, few, plan, part, groups](int64_t t) {
    const Product& group = few[t % groups];
    const int64_t begin = t / groups * part;
    kernels_.run_few(group, begin, std::min(group.n, begin + part),
                     scratch_buffer().floats(plan.few_scratch));
  };
  return schedule_.add(ceil_div(p.n, part) * groups, after, run);
}

bool has_few_tokens(const Product& p) {
  const bool by_rows =
      p.b.column_stride == 1 && (!p.finish.out.data || p.finish.out.column_stride == 1);
  const bool special =
      p.slope.pre.data || p.loss.target || p.finish.sums.data || p.finish.to_sums.data;
  // Weights that lie across must change their order for a tile, which has to pay.
  const int64_t most = p.a.column_stride == 1 ? kFewTokens : 4 * kFewTokens;
  return p.m <= most && by_rows && !special;
}

void multiply_now(const Product& p, int threads) {
  if (p.m == 0 || p.n == 0) return;
  Products products(p.type, threads);
  has_few_tokens(p) ? products.multiply_few(p) : products.multiply(p);
  products.run();
}

void bwd_rows_now(const LinearParams& p, const Matrix& dout, const Matrix& dz, void* db,
                  int threads) {
  constexpr int64_t kRows = 64, kColumns = 256;  // of a task
  const ProductKernels& kernels = cpu_kernels().product[static_cast<int>(p.type)];
  Workspace workspace;
  const int64_t blocks = ceil_div(p.m, kRows);
  float* sums = db ? workspace.floats(blocks * p.n) : nullptr;
  for_each(threads, blocks, [&](int64_t t) {
    kernels.bwd_rows(p, dout, dz, sums ? sums + t * p.n : nullptr, t * kRows,
                     std::min(p.m, (t + 1) * kRows));
  });
  if (!db) return;
  for_each(threads, ceil_div(p.n, kColumns), [&](int64_t t) {
    kernels.add_sums(p, sums, blocks, db, t * kColumns, std::min(p.n, (t + 1) * kColumns));
  });
}

}  // namespace fastattn
