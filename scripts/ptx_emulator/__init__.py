"""An emulator of PTX: runs CUDA programs that XLA compiled, without a GPU.

It reads XLA's dump of a program and executes each PTX instruction with numpy, as NVIDIA's "PTX ISA" manual, version
8.8, defines it. It computes what a kernel computes, not how long that takes, and refuses instructions that it does not
support. The package imports numpy and ml_dtypes only. README.md lists its modules and the supported instructions.
"""
