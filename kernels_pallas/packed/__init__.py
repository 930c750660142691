"""How a GPU kernel reads a stored weight: 32-bit words, each holding a few elements of one row, unpacked in registers.

layout.py      the arrays that a kernel gets for a weight, and the order in which it reads them
dequantize.py  `load_tile`: a tile of a weight, loaded and dequantised
unpack.py      32-bit words -> the numbers in them
ptx_ops.py     the instructions for that, as PTX and in plain `jnp`
"""
