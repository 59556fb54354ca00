#include "program.h"

#include "cpu/parallel.h"

namespace py = pybind11;

namespace fastattn {

namespace {

thread_local Program* current = nullptr;

}  // namespace

Program* Program::recording() { return current; }

void Program::start() {
  if (current) throw py::value_error("a program is being recorded on this thread");
  current = this;
}

void Program::stop() { current = nullptr; }

void Program::add(std::function<void()> step, py::tuple arguments) {
  steps_.push_back(std::move(step));
  arguments_.push_back(std::move(arguments));
}

void Program::run(int threads) const {
  if (current) throw py::value_error("a program cannot run while one is being recorded");
  const py::gil_scoped_release release;
  with_team(threads, [this] {
    for (const std::function<void()>& step : steps_) step();
  });
}

void bind_program(py::module_& m) {
  py::class_<Program>(m, "Program")
      .def(py::init<>())
      .def("start", &Program::start)
      .def("stop", &Program::stop)
      .def("run", &Program::run)
      .def("__len__", &Program::size);
}

}  // namespace fastattn
