"""Analysis of compiled programs: kernels counted through loops, copies of weights found. `make check-cuda` compiles."""

from pathlib import Path

from mtpjax.loading.loaded_model import flatten_params
from scripts.gpu.check_cuda import problems
from scripts.gpu.compiled_code import CompiledProgram, float_instructions, loop_overheads
from scripts.gpu.count_instructions import bits_per_weight, loop_instructions, weights_per_iteration
from scripts.gpu.cuda_cases import program_case, weight_shapes

HLO = """HloModule jit_f, is_scheduled=true

%fused_slice (param_0: u8[5,64,32]) -> u8[1,64,32] {
  %param_0 = u8[5,64,32]{2,1,0} parameter(0)
  %zero = s32[] constant(0)
  ROOT %slice = u8[1,64,32]{2,1,0} dynamic-slice(%param_0, %zero, %zero, %zero), dynamic_slice_sizes={1,64,32}
}

%attend (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%a), index=1
  %turn.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused_slice
  %turn.2 = f32[8]{0} custom-call(%turn.1), custom_call_target="a"
  ROOT %tuple = (s32[], f32[8]{0}) tuple(%x, %turn.2)
}

%test (a: (s32[], f32[8])) -> pred[] {
  %a = (s32[], f32[8]{0}) parameter(0)
  ROOT %less = pred[] fusion(%a), kind=kLoop, calls=%fused_slice
}

%layer (c: (s32[], u8[5,64,32])) -> (s32[], u8[5,64,32]) {
  %c = (s32[], u8[5,64,32]{2,1,0}) parameter(0)
  %w = u8[5,64,32]{2,1,0} get-tuple-element(%c), index=1
  %view = u32[5,64,8]{2,1,0} bitcast(%w)
  %cut = u8[1,64,32]{2,1,0} fusion(%w), kind=kLoop, calls=%fused_slice
  %inner = (s32[], f32[8]{0}) while(%c), condition=%test, body=%attend
  ROOT %tuple.1 = (s32[], u8[5,64,32]{2,1,0}) tuple(%c, %w)
}

ENTRY %main (w: u8[5,64,32]) -> f32[8] {
  %w.1 = u8[5,64,32]{2,1,0} parameter(0)
  %loop = (s32[], u8[5,64,32]) while(%w.1), condition=%test, body=%layer, backend_config={"known_trip_count":{"n":"10"}}
  %copy.1 = f32[8]{0} copy(%w.1)
  ROOT %either = f32[8]{0} conditional(%copy.1, %w.1), branch_computations={%test, %attend}
}
"""


def test_kernels_are_counted_through_loops() -> None:
    kernels, loops = CompiledProgram(HLO).count_kernels()
    # the copy, the longer branch, and ten iterations of one kernel and its condition
    assert kernels == 1 + 2 + 10 * (1 + 1)
    assert loops == [(2 + 1, 10)]  # kernels of the inner loop's body and its condition; entered ten times


def test_copies_are_buffers_of_the_type_of_a_weight() -> None:
    program = CompiledProgram(HLO)
    assert program.count_buffers({"u8[64,32]"}) == {"u8[64,32]": 1}  # of the fusion; instructions inside write none
    assert not program.count_buffers({"u8[5,64,32]", "u32[5,64,8]"})  # parameters and bitcasts write none


def test_weight_shapes_are_those_of_stacks_and_layers() -> None:
    _, args, _, params = program_case("decode")
    experts, others = weight_shapes(params)
    assert {"u8[1,256,1024,1024]", "u8[256,1024,1024]", "u32[256,1024,256]", "f16[256,1024,64]"} <= experts
    assert {"u8[1,8192,1024]", "u8[8192,1024]", "u8[248320,1024]"} <= others
    assert args[0] is params


def test_a_mixed_file_keeps_the_type_of_every_matrix() -> None:
    """The mixture of llama.cpp: of 41 layers with the MTP block, 22 have down projections of six bits, 19 of four."""
    _, args, _, params = program_case("decode q4_k_m")
    assert args[0] is params
    down = {
        path: leaf[...] for path, leaf in flatten_params(params).items() if path[-1] == "down" and "shared" not in path
    }
    six_bits = [
        int(path[2]) * 4 + int(path[4]) for path, w in down.items() if w.layout == "codes6" and path[0] == "decoder"
    ]
    assert sorted(six_bits) == [0, 1, 2, 3, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, *range(35, 40)]
    assert {w.layout for w in down.values()} == {"codes4", "codes6"}
    assert down["mtp", "layer", "mlp", "down"].layout == "codes6"
    experts, others = weight_shapes(params)
    assert {"u16[256,2048,64]", "s8[256,2048,32]", "f16[256,2048,2]"} <= experts and "u8[8192,256]" in others


def test_float_instructions_of_a_kernel(tmp_path: Path) -> None:
    """Only floating-point instructions, predicated or not, and only of kernels with a given prefix."""
    ptx = """
.visible .entry matmul_codes4(
	add.s32 %r1, %r2, 1;
	@%p1 fma.rn.f32 %r3, %r4, %r5, %r6;
	cvt.rn.bf16x2.f32 %r7, %r8, %r9;
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};
	st.global.v4.b32 [%rd1], {%r1};
.visible .entry loop_fusion(
	add.f32 %r1, %r2, %r3;
"""
    (tmp_path / "one.ptx").write_text(ptx)
    mma = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    assert float_instructions(tmp_path, ("matmul_",)) == {"matmul_codes4": ["fma.rn.f32", "cvt.rn.bf16x2.f32", mma]}


def test_overheads_of_a_loop_are_counted(tmp_path: Path) -> None:
    ptx = """
.visible .entry matmul_codes4(
	ld.global.b16 %rs1, [%rd1];
$L__BB0_1:
	@%p1 ld.global.b16 %rs2, [%rd1];
	st.shared.b16 [%r1], %rs2;
	cp.async.cg.shared.global [ %r2 + 0 ], [ %rd2 + 0 ], 0x10, 0x10;
	@%p2 bra $L__BB0_1;
	bra.uni $L__BB0_2;
	st.shared.b32 [%r1], %r3;
$L__BB0_2:
	ret;
"""
    (tmp_path / "one.ptx").write_text(ptx)
    assert loop_overheads(tmp_path, ("matmul_",)) == {"matmul_codes4": {"unprefetched": 1, "stored": 1, "shuffled": 0}}
    assert loop_overheads(tmp_path, ("experts_",)) == {}


def test_problems_of_compiled_results() -> None:
    kernel = {"card": "rtx3090", "case": "linear fp8 decode", "kernels": {}, "differ_for_one_row": []}
    assert problems(kernel) == []
    expected = "matmul_fp8: other instructions for one row than for five"
    assert problems(kernel | {"differ_for_one_row": ["matmul_fp8"]}) == [expected]
    none = {"unprefetched": 0, "stored": 0, "shuffled": 0}
    four_bits = kernel | {"case": "linear iq4_nl decode", "kernels": {"matmul_codes4": none}}
    assert problems(four_bits) == []
    waits = {"kernels": {"matmul_codes4": none | {"unprefetched": 2}}}
    shuffles = {"kernels": {"matmul_codes4": none | {"shuffled": 32}}}
    assert problems(four_bits | waits) == ["matmul_codes4: 2 loads of its loop are not prefetched"]
    expected = "matmul_codes4: its loop passes weights on (0 stores, 32 shuffles)"
    assert problems(four_bits | shuffles) == [expected] and problems(four_bits | shuffles | {"card": "b200"}) == []
    assert problems(four_bits | shuffles | {"case": "linear iq4_nl prefill"}) == []
    spills = {"kernels": {"matmul_codes4": none | {"spilled": 16}}}
    assert problems(four_bits | spills) == ["matmul_codes4: 16 bytes of spilled registers"]
    assert problems(four_bits | spills | {"case": "linear iq4_nl decode float32"}) == []
    program = {
        "card": "rtx3090",
        "case": "decode",
        "argument": 20 * 2**30,
        "temp": 0,
        "expert_copies": {},
        "packed_copies": {},
    }
    assert problems(program) == []
    assert problems(program | {"argument": 24 * 2**30}) == ["needs 24.00 GiB of 23.0"]
    assert problems(program | {"argument": 24 * 2**30, "card": "h200"}) == []
    assert problems(program | {"expert_copies": {"u8[256,1024,1024]": 4}}) == [
        "expert copies: {'u8[256,1024,1024]': 4}"
    ]
    assert problems({"card": "b200", "case": "linear fp8 decode", "error": "no"}) == ["no"]


SASS = """
.L_x_1:
        /*0000*/                   PRMT R1, R2, 0x4140, RZ ;
        /*0010*/              @P0  BRA `(.L_x_1) ;
.L_x_2:
        /*0020*/                   HFMA2.BF16_V2 R3, R1, R4, R5 ;
        /*0030*/              @!P1 LDS.64 R6, [R7] ;
        /*0040*/                   HMMA.16816.F32.BF16 R8, R8, R6, R8 ;
        /*0050*/              @UP0 BRA `(.L_x_2) ;
        /*0060*/                   EXIT ;
"""


def test_instructions_are_counted_in_the_longest_loop() -> None:
    assert loop_instructions(SASS) == {"HFMA2": 1, "LDS": 1, "HMMA": 1, "BRA": 1}
    assert weights_per_iteration("experts_gate_up_codes4") == 2 * weights_per_iteration("matmul_codes4") == 128
    assert bits_per_weight("iq4_nl") == 4.5 and bits_per_weight("q4_k") == 4.625 and bits_per_weight("bf16") == 16
