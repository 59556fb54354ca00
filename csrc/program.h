// Kernels that were launched once, with their parameters, to be run again as one call.
#pragma once

#include <pybind11/pybind11.h>

#include <functional>
#include <utility>
#include <vector>

#include "tensor.h"

namespace fastattn {

// While a thread records into a program, all that it launches also becomes a step. A step runs on
// the memory that it was recorded with, which the program keeps alive.
class Program {
 public:
  static Program* recording();

  void start();
  void stop();
  void add(std::function<void()> step, pybind11::tuple arguments);
  // All steps in order, on threads that stay awake in between.
  void run(int threads) const;
  size_t size() const { return steps_.size(); }

 private:
  std::vector<std::function<void()>> steps_;
  std::vector<pybind11::tuple> arguments_;
};

// Runs a kernel without Python's lock. `kernel` holds all it needs by value, but for the memory,
// which `arguments` own.
template <class F, class... Arguments>
void launch(F kernel, const Arguments&... arguments) {
  check_python();
  if (Program* program = Program::recording()) {
    program->add(kernel, pybind11::make_tuple(arguments...));
  }
  const pybind11::gil_scoped_release release;
  kernel();
}

}  // namespace fastattn
