#include "linear_call.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

namespace fastattn {

Matrix matrix(const Tensor& x) { return {x.data, x.stride[0], x.stride[1]}; }

Activation activation(PyObject* name) {
  static constexpr const char* kNames[] = {"none",      "relu", "relu2",   "gelu",
                                           "gelu_tanh", "silu", "sigmoid", "tanh"};
  const char* text = PyUnicode_AsUTF8(name);
  for (int i = 0; text && i < 8; ++i) {
    if (std::strcmp(text, kNames[i]) == 0) return static_cast<Activation>(i);
  }
  throw pybind11::value_error(std::string("activation: the core has no '") + (text ? text : "?") +
                              "'");
}

Dropout dropout(PyObject* p, PyObject* seed, uint32_t plane) {
  Dropout d = {};
  const double share = PyFloat_AsDouble(p);
  if (!(share > 0.0)) return d;
  // As `threshold` of fastattn/dropout.py.
  const double words = std::nearbyint(share * 4294967296.0);
  d.threshold = static_cast<uint32_t>(std::min(words, 4294967295.0));
  d.scale = static_cast<float>(1.0 / (1.0 - share));
  d.seed = static_cast<uint64_t>(*array<int64_t>(seed));
  d.plane = plane;
  return d;
}

}  // namespace fastattn
