"""Runs the library's CUDA kernels on the CPU and checks what they do; see README.md."""
