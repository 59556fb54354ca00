// fastattn._C: a list of names. Each op's .cpp turns Python's arguments into its Params.
#include <pybind11/pybind11.h>

namespace fastattn {
void bind_attention(pybind11::module_& m);
void bind_feed_forward(pybind11::module_& m);
void bind_linear(pybind11::module_& m);
void bind_linear_cross_entropy(pybind11::module_& m);
void bind_machine(pybind11::module_& m);
void bind_norm(pybind11::module_& m);
void bind_program(pybind11::module_& m);
void bind_rotary(pybind11::module_& m);
void bind_tensor(pybind11::module_& m);
}  // namespace fastattn

PYBIND11_MODULE(_C, m) {
  fastattn::bind_machine(m);
  fastattn::bind_tensor(m);
  fastattn::bind_attention(m);
  fastattn::bind_feed_forward(m);
  fastattn::bind_linear(m);
  fastattn::bind_linear_cross_entropy(m);
  fastattn::bind_norm(m);
  fastattn::bind_program(m);
  fastattn::bind_rotary(m);
}
