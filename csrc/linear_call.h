// What the calls of linear layers share, as Python hands them over.
#pragma once

#include "linear.h"
#include "tensor.h"

namespace fastattn {

// A tensor of rank 2; none from None.
Matrix matrix(const Tensor& x);
// A name of fastattn/ops/_activation.py, or "none".
Activation activation(PyObject* name);
// Throws no error: what is wrong raises in check_python().
Dropout dropout(PyObject* p, PyObject* seed, uint32_t plane);

}  // namespace fastattn
