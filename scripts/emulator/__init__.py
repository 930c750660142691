"""Runs compiled CUDA programs without a GPU: reads the PTX that XLA made and does what each instruction says, in numpy.

`program.py` runs a whole program, kernel after kernel; `machine.py` one kernel; `arithmetic.py`, `movement.py` and
`tensor_cores.py` are the instructions, `ptx.py` reads them, `memory.py` is what they load from and store to. Semantics are those
of NVIDIA's "PTX ISA" manual, version 8.8. It computes what a kernel computes, not how long that takes.
"""
