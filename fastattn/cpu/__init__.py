"""How, on the CPU: launchers for the kernels of csrc/cpu."""
