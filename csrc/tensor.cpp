#include "tensor.h"

#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

namespace fastattn {

namespace {

// DLPack's view of a tensor and the head of its C exchange table, which torch.Tensor carries from
// torch 2.10 on; their layout is fixed for all versions 1.x (dmlc.github.io/dlpack).
struct DLTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;  // null: row by row
  uint64_t byte_offset;
};
struct ExchangeTable {
  struct {
    uint32_t major, minor;
  } version;
  ExchangeTable* previous;
  void* unused[3];
  int (*view)(void* object, DLTensor* out);  // -1 with a Python exception set; may be null
};
constexpr int32_t kHost = 1;

const ExchangeTable* find_exchange_table() {
  const py::object tensor = py::module_::import("torch").attr("Tensor");
  const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  void* p = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  const auto* table = static_cast<const ExchangeTable*>(p);
  while (table && table->version.major > 1) table = table->previous;
  return table && table->view ? table : nullptr;
}

// code: 0 integer, 2 float, 4 bfloat, 6 bool.
Type type_of(uint8_t code, uint8_t bits) {
  switch (code << 8 | bits) {
    case 2 << 8 | 32:
      return Type::kFloat32;
    case 4 << 8 | 16:
      return Type::kBFloat16;
    case 2 << 8 | 16:
      return Type::kFloat16;
    case 0 << 8 | 8:
      return Type::kInt8;
    case 6 << 8 | 8:
      return Type::kBool;
    case 0 << 8 | 32:
      return Type::kInt32;
    case 0 << 8 | 64:
      return Type::kInt64;
  }
  return Type::kOther;
}

Type type_named(const std::string& name) {
  if (name == "torch.float32") return Type::kFloat32;
  if (name == "torch.bfloat16") return Type::kBFloat16;
  if (name == "torch.float16") return Type::kFloat16;
  if (name == "torch.int8") return Type::kInt8;
  if (name == "torch.bool") return Type::kBool;
  if (name == "torch.int32") return Type::kInt32;
  if (name == "torch.int64") return Type::kInt64;
  return Type::kOther;
}

void check_dims(int64_t ndim) {
  if (ndim > Tensor::kMaxDims) throw py::value_error("a tensor of more than 4 dimensions");
}

}  // namespace

Strided Tensor::strided() const {
  Strided x;
  x.data = data;
  for (int i = 0; i < ndim; ++i) x.stride[i] = stride[i];
  return x;
}

Strided Tensor::broadcast() const {
  Strided x = strided();
  for (int i = 0; i < ndim; ++i) x.stride[i] = shape[i] == 1 ? 0 : stride[i];
  return x;
}

Tensor tensor_by_attributes(PyObject* object) {
  const py::handle x(object);
  if (!x.attr("is_cpu").cast<bool>()) throw py::value_error("a tensor that is not in host memory");
  const auto shape = x.attr("shape").cast<py::tuple>();
  const auto stride = x.attr("stride")().cast<py::tuple>();
  check_dims(static_cast<int64_t>(shape.size()));
  Tensor found;
  found.data = reinterpret_cast<void*>(x.attr("data_ptr")().cast<uintptr_t>());
  found.type = type_named(py::str(x.attr("dtype")));
  found.ndim = static_cast<int>(shape.size());
  for (size_t i = 0; i < shape.size(); ++i) {
    found.shape[i] = shape[i].cast<int64_t>();
    found.stride[i] = stride[i].cast<int64_t>();
  }
  return found;
}

Tensor tensor_of(PyObject* x) {
  if (x == Py_None) return {};
  static const ExchangeTable* const table = find_exchange_table();
  if (!table) return tensor_by_attributes(x);
  DLTensor view;
  if (table->view(x, &view) != 0) throw py::error_already_set();
  if (view.device.type != kHost) throw py::value_error("a tensor that is not in host memory");
  check_dims(view.ndim);
  Tensor found;
  found.data = static_cast<char*>(view.data) + view.byte_offset;
  found.type = type_of(view.dtype.code, view.dtype.bits);
  found.ndim = view.ndim;
  int64_t next = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    found.shape[i] = view.shape[i];
    found.stride[i] = view.strides ? view.strides[i] : next;
    next *= view.shape[i];
  }
  return found;
}

void check_python() {
  if (PyErr_Occurred()) throw py::error_already_set();
}

void bind_tensor(py::module_& m) {
  // For tests: what tensor_of reads, by the exchange table or by attributes.
  m.def(
      "describe",
      [](const py::object& x, bool by_attributes) {
        const Tensor t = by_attributes ? tensor_by_attributes(x.ptr()) : tensor_of(x.ptr());
        py::list shape, stride;
        for (int i = 0; i < t.ndim; ++i) {
          shape.append(t.shape[i]);
          stride.append(t.stride[i]);
        }
        return py::make_tuple(reinterpret_cast<uintptr_t>(t.data), static_cast<int>(t.type), shape,
                              stride);
      },
      py::arg("x"), py::arg("by_attributes"));
}

}  // namespace fastattn
