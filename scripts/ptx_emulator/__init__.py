"""Runs compiled CUDA programs without a GPU: reads the PTX that XLA made and does what each instruction says, in numpy.

`card.py` lets `mtpjax` run on a card that is not here. `program.py` runs a program, kernel after kernel, as `dump.py` reads it
from what XLA wrote down; `machine.py` runs a kernel. `arithmetic.py`, `conversion.py`, `movement.py`, `tensor_cores.py` and
`blackwell.py` are the instructions, `ptx.py` reads them, `memory.py` is what they load from and store to. Semantics are those
of NVIDIA's "PTX ISA" manual, version 8.8. It computes what a kernel computes, not how long that takes, and an instruction that
it does not know is an error.
"""
