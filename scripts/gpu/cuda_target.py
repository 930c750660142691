"""Compilation for NVIDIA GPUs on a machine that has none.

XLA's CUDA plugin compiles down to machine code for a GPU that is only described: Triton kernels, fusions, buffers. It
cannot run, time or autotune anything here. Needs `jax[cuda12-local]`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh

from kernels_pallas.platform import compile_options, override_platform

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU as XLA describes it.

    `name` is the kind of device in tile tables, `kind` the name that jax looks up. jax does not know the RTX 3090; an
    A10 has the same compute capability and memory hierarchy.
    """

    name: str
    kind: str
    capability: tuple[int, int]
    cores: int  # multiprocessors
    shared_kib: int  # of a multiprocessor
    threads: int  # of a multiprocessor
    memory_gib: float
    gb_per_second: int
    l2_mib: int
    ghz: float
    fpus: int = 128

    def config(self) -> str:
        """Return the `GpuTargetConfig` text proto."""
        major, minor = self.capability
        return f"""gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
            shared_memory_per_core: {self.shared_kib * 1024}
            shared_memory_per_block_optin: {(self.shared_kib - 1) * 1024}
            threads_per_core_limit: {self.threads} core_count: {self.cores} fpus_per_core: {self.fpus}
            block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            memory_bandwidth: {self.gb_per_second}000000000 l2_cache_size: {self.l2_mib * 2**20}
            clock_rate_ghz: {self.ghz} device_memory_size: {int(self.memory_gib * GIB)}
            cuda_compute_capability {{ major: {major} minor: {minor} }}
            registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
            platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 8 }}
            device_description_str: "{self.kind}" """


CARDS = {
    "rtx3090": Card("RTX 3090", "NVIDIA A10", (8, 6), 82, 100, 1536, 23.6, 936, 6, 1.695),
    "a100": Card("A100", "NVIDIA A100-SXM4-40GB", (8, 0), 108, 164, 2048, 39.4, 1555, 40, 1.41, 64),
    "rtx4090": Card("RTX 4090", "NVIDIA GeForce RTX 4090", (8, 9), 128, 100, 1536, 23.5, 1008, 72, 2.52),
    "rtx5090": Card("RTX 5090", "NVIDIA GeForce RTX 5090", (12, 0), 170, 100, 1536, 31.8, 1792, 96, 2.41),
    "h100": Card("H100", "NVIDIA H100 80GB HBM3", (9, 0), 132, 228, 2048, 79.6, 3350, 50, 1.98),
    "h200": Card("H200", "NVIDIA H200", (9, 0), 132, 228, 2048, 139.8, 4800, 50, 1.98),
    "b200": Card("B200", "NVIDIA B200", (10, 0), 148, 228, 2048, 178.4, 8000, 126, 1.97),
}

# The second flag makes jax 0.11 keep the PTX, too; the third writes all constants out.
DUMP_FLAGS = "--xla_dump_to={} --xla_dump_emitter_re=ptx --xla_dump_large_constants=true"
ONLY_PTX_FLAG = "--xla_gpu_disable_gpuasm_optimizations=true"  # for the assembler, which comes after the PTX


class CompileTarget:
    """A described card that programs are compiled for. Create it before jax is first used: it sets XLA's flags.

    Args:
        dump: folder that gets all files that XLA writes about each program.
        only_ptx: the machine code is not used, so the assembler may hurry.
    """

    def __init__(self, card: Card, dump: Path | None = None, only_ptx: bool = False):
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the check asks the driver, which is missing
        flags = [os.environ.get("XLA_FLAGS", ""), "--xla_gpu_autotune_level=0"]
        flags += ([DUMP_FLAGS.format(dump)] if dump else []) + ([ONLY_PTX_FLAG] if only_ptx else [])
        os.environ["XLA_FLAGS"] = " ".join(flags)
        topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=card.config())
        self.mesh = topologies.make_mesh(topology, (1,), ("x",))
        self.card = card

    def compile(self, fn: Any, *shapes: Any, **static: Any) -> jax.stages.Compiled:
        """Compile a jitted function for arguments of these shapes (trees of `jax.ShapeDtypeStruct`)."""
        sharding = NamedSharding(self.mesh, PartitionSpec())
        args = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)
        with (
            override_platform("cuda", self.card.capability, device_kind=self.card.name),
            use_abstract_mesh(self.mesh.abstract_mesh),
        ):
            return fn.lower(*args, **static).compile(**compile_options())


def memory_bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Return the bytes of arguments, of outputs, of temporaries, and of outputs that alias arguments."""
    analysis = compiled.memory_analysis()
    return {name: getattr(analysis, f"{name}_size_in_bytes") for name in ("argument", "output", "temp", "alias")}
