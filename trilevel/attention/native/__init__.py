"""C++ kernels of attention, compiled to one shared library for each instruction set."""
