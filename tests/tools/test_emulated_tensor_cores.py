"""The emulator's tensor cores, of Ampere, Hopper and Blackwell, each compared with a product in numpy."""

import math

import ml_dtypes
import numpy as np
import pytest

from scripts.ptx_emulator.ptx import EmulationError
from scripts.ptx_emulator.tensor_cores import multiply
from tests.helpers.ptx import run_ptx

BF16 = ml_dtypes.bfloat16


def test_product_of_a_warp() -> None:
    """16 x 16 by 16 x 8. `ldmatrix` loads the first matrix from shared memory, and the second one transposed."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(16, 16)).astype(BF16), rng.normal(size=(16, 8)).astype(BF16)
    text = """
    shl.b32 %r4, %r0, 4;
    cvt.u64.u32 %rd8, %r4;
    add.s64 %rd9, %rd0, %rd8;
    cp.async.cg.shared.global [%r4], [%rd9], 16;
    setp.lt.u32 %p1, %r0, 16;
    add.s64 %rd10, %rd1, %rd8;
    @%p1 cp.async.cg.shared.global [%r4+512], [%rd10], 16;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    and.b32 %r5, %r0, 15;
    shl.b32 %r6, %r5, 5;
    shr.u32 %r7, %r0, 4;
    shl.b32 %r8, %r7, 4;
    add.s32 %r6, %r6, %r8;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r6];
    shl.b32 %r9, %r5, 4;
    ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r24, %r25}, [%r9+512];
    mov.b32 %r30, 0; mov.b32 %r31, 0; mov.b32 %r32, 0; mov.b32 %r33, 0;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        {%r30, %r31, %r32, %r33}, {%r20, %r21, %r22, %r23}, {%r24, %r25}, {%r30, %r31, %r32, %r33};
    shr.u32 %r10, %r0, 2;
    shl.b32 %r11, %r10, 5;
    and.b32 %r12, %r0, 3;
    shl.b32 %r13, %r12, 3;
    add.s32 %r14, %r11, %r13;
    cvt.u64.u32 %rd11, %r14;
    add.s64 %rd12, %rd2, %rd11;
    st.global.v2.b32 [%rd12], {%r30, %r31};
    st.global.v2.b32 [%rd12+256], {%r32, %r33};
    """
    out = run_ptx(text, [a, b, np.zeros((16, 8), np.float32)], shared=1024)[2]
    np.testing.assert_allclose(out, a.astype(np.float32) @ b.astype(np.float32), rtol=1e-5, atol=1e-5)


def test_product_in_tensor_memory() -> None:
    """64 x 16 by 16 x 8, of capability 10.0: the first matrix is in tensor memory, the second one in shared memory."""
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(64, 16)).astype(BF16), rng.normal(size=(8, 16)).astype(BF16)
    # float32 of bfloat16, 64 x 8
    instruction_descriptor = 1 << 4 | 1 << 7 | 1 << 10 | 8 // 8 << 17 | 64 // 16 << 24
    text = f"""
    shl.b32 %r4, %r0, 4;
    cvt.u64.u32 %rd8, %r4;
    add.s64 %rd9, %rd1, %rd8;
    setp.lt.u32 %p1, %r0, 16;
    @%p1 cp.async.cg.shared.global [%r4], [%rd9], 16;
    cp.async.wait_all;
    shr.u32 %r5, %r0, 5;
    setp.eq.u32 %p2, %r5, 0;
    mov.b32 %r6, 512;
    @%p2 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r6], 32;
    setp.eq.u32 %p3, %r0, 0;
    mov.b32 %r7, 520;
    @%p3 mbarrier.init.shared::cta.b64 [%r7], 1;
    bar.sync 0;
    ld.shared.b32 %r8, [%r6];
    and.b32 %r9, %r0, 15;
    shl.b32 %r10, %r5, 4;
    add.s32 %r9, %r9, %r10;
    shl.b32 %r11, %r9, 5;
    bfe.u32 %r12, %r0, 4, 1;
    shl.b32 %r13, %r12, 4;
    add.s32 %r11, %r11, %r13;
    cvt.u64.u32 %rd10, %r11;
    add.s64 %rd11, %rd0, %rd10;
    ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%rd11];
    shl.b32 %r14, %r5, 21;
    add.s32 %r15, %r8, %r14;
    tcgen05.st.sync.aligned.16x32bx2.x4.b32 [%r15 + 0], 4, {{%r20, %r21, %r22, %r23}};
    tcgen05.wait::st.sync.aligned;
    bar.sync 0;
    elect.sync %r16|%p4, -1;
    and.pred %p5, %p4, %p2;
    mov.b64 %rd12, {1 << 46 | 256 >> 4 << 32 | 128 >> 4 << 16};
    mov.b32 %r17, {instruction_descriptor};
    mov.pred %p6, 0;
    @%p5 tcgen05.mma.cta_group::1.kind::f16 [%r8 + 16], [%r8 + 0], %rd12, %r17, %p6;
    @%p5 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r7];
    {{
    .reg .pred complete;
    waitLoop:
    mbarrier.try_wait.parity.shared::cta.b64 complete, [%r7], 0;
    @!complete bra.uni waitLoop;
    }}
    tcgen05.ld.sync.aligned.16x32bx2.x4.b32 {{%r30, %r31, %r32, %r33}}, [%r15 + 16], 4;
    tcgen05.wait::ld.sync.aligned;
    add.s64 %rd13, %rd2, %rd10;
    st.global.v4.b32 [%rd13], {{%r30, %r31, %r32, %r33}};
    """
    core_matrices = np.ascontiguousarray(b.reshape(8, 2, 8).transpose(1, 0, 2))  # of 8 rows of 16 bytes
    out = run_ptx(text, [a, core_matrices, np.zeros((64, 8), np.float32)], threads=128, shared=528)[2]
    np.testing.assert_allclose(out, a.astype(np.float32) @ b.astype(np.float32).T, rtol=1e-5, atol=1e-5)
    wait = "mbarrier.try_wait.parity.shared::cta.b64 complete, [%r7], 0;"
    without_wait = text.replace(wait, "setp.eq.s32 complete, %r4, %r4;")
    with pytest.raises(EmulationError, match="before the wait for its product"):
        run_ptx(without_wait, [a, core_matrices, np.zeros((64, 8), np.float32)], threads=128, shared=528)


@pytest.mark.parametrize("swizzled", [False, True])
def test_product_of_a_warpgroup(swizzled: bool) -> None:
    """64 x 16 by 16 x 8, both in shared memory with columns along K.

    They lie in core matrices of 8 rows of 16 bytes, or in lines of 128 bytes with units of 16 bytes that are permuted
    by the number of the line.
    """
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(64, 16)).astype(BF16), rng.normal(size=(8, 16)).astype(BF16)

    def lay_out(x: np.ndarray) -> np.ndarray:
        if not swizzled:
            return x.reshape(-1, 8, 2, 8).transpose(0, 2, 1, 3).reshape(-1)
        lines = np.zeros((len(x), 8, 8), BF16)
        for row in range(len(x)):
            for unit in range(2):
                lines[row, unit ^ row % 8] = x[row, 8 * unit : 8 * unit + 8]
        return lines.reshape(-1)

    image = np.concatenate([lay_out(a), lay_out(b)])
    begin = 2 * lay_out(a).size
    leading, stride, mode = (128, 256, 0) if not swizzled else (16, 1024, 1)
    low, high = leading >> 4 << 16, stride >> 4 | mode << 30
    lines = [f"cp.async.cg.shared.global [%r4+{n}], [%rd9+{n}], 16;" for n in range(0, image.nbytes - 2047, 2048)]
    rest = image.nbytes % 2048 // 16
    text = f"""
    shl.b32 %r4, %r0, 4;
    cvt.u64.u32 %rd8, %r4;
    add.s64 %rd9, %rd0, %rd8;
    {"".join(lines)}
    setp.lt.u32 %p1, %r0, {rest};
    @%p1 cp.async.cg.shared.global [%r4+{image.nbytes // 2048 * 2048}], [%rd9+{image.nbytes // 2048 * 2048}], 16;
    cp.async.wait_all;
    bar.sync 0;
    mov.b64 %rd10, {high << 32 | low};
    mov.b64 %rd11, {high << 32 | low | begin >> 4};
    mov.b32 %r20, 0; mov.b32 %r21, 0; mov.b32 %r22, 0; mov.b32 %r23, 0;
    mov.pred %p2, -1;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r20,%r21,%r22,%r23}}, %rd10, %rd11, %p2, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    shr.u32 %r10, %r0, 5;
    shl.b32 %r11, %r10, 9;
    shr.u32 %r12, %r0, 2;
    and.b32 %r12, %r12, 7;
    shl.b32 %r13, %r12, 5;
    and.b32 %r14, %r0, 3;
    shl.b32 %r15, %r14, 3;
    add.s32 %r16, %r11, %r13;
    add.s32 %r16, %r16, %r15;
    cvt.u64.u32 %rd12, %r16;
    add.s64 %rd13, %rd1, %rd12;
    st.global.v2.b32 [%rd13], {{%r20, %r21}};
    st.global.v2.b32 [%rd13+256], {{%r22, %r23}};
    """
    out = run_ptx(text, [image, np.zeros((64, 8), np.float32)], threads=128, shared=image.nbytes)[1]
    np.testing.assert_allclose(out, a.astype(np.float32) @ b.astype(np.float32).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
@pytest.mark.parametrize("exponents", [1, 12, 24])
def test_an_element_has_the_same_bits_in_products_of_every_shape(kind: str, exponents: int) -> None:
    """Terms nearly cancel, so that a sum in another order is another number if float64 does not hold it exactly."""
    rng = np.random.default_rng(exponents)
    dtype = {"bf16": BF16, "f16": np.float16, "tf32": BF16}[kind]

    def matrices(rows: int, sign: int) -> np.ndarray:
        half = rng.normal(size=(3, rows, 8)) * 2.0 ** np.linspace(exponents // 2, -exponents // 2, 8).round()
        return np.concatenate([half, sign * half[..., ::-1]], axis=-1).astype(dtype).astype(np.float32)

    a, b = matrices(64, -1), matrices(128, 1)
    a[..., 7] *= 2  # what remains
    a[0, 1], b[1, 2, 3] = 0, 0
    whole = multiply(a, b, kind)
    terms = a[:, :4, None].astype(np.float64) * b[:, None, :4].astype(np.float64)
    exact = np.array([math.fsum(each) for each in terms.reshape(-1, 16)]).reshape(3, 4, 4)
    allowed = 2.0**-24 * np.abs(exact) + (2.0**-49 * np.abs(terms).sum(-1) if exponents == 24 else 0)
    assert (np.abs(whole[:, :4, :4] - exact) <= allowed).all()
    for rows, columns in ((64, 8), (16, 8), (64, 64), (64, 1), (1, 1)):
        part = multiply(a[:, :rows], b[:, :columns], kind)
        assert (part.view(np.uint32) == whole[:, :rows, :columns].view(np.uint32)).all()
    assert (multiply(a[1:2], b[1:2], kind) == whole[1:2]).all()


def test_numbers_that_are_not_finite_stay_in_their_rows_and_columns() -> None:
    a, b = np.ones((1, 16, 16), np.float32), np.ones((1, 8, 16), np.float32)
    a[0, 3, 5], b[0, 2, 7] = np.nan, np.inf
    product = multiply(a, b, "bf16")[0]
    assert np.isnan(product[3]).all() and np.isposinf(np.delete(product, 3, 0)[:, 2]).all()
    assert (np.delete(np.delete(product, 3, 0), 2, 1) == 16).all()
