#define FASTATTN_ISA generic
#include "kernels.inl.h"
