"""How, on GPUs: kernels in Triton, and on the CPU under its interpreter (TRITON_INTERPRET=1)."""
