#define FASTATTN_ISA avx2
#include "kernels.inl.h"
