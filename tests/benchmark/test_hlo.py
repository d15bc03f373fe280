"""Reading the HLO program of a GPU: every kernel of a small program, and each kind of instruction that matters."""

from pathlib import Path

import pytest

from capsnet_benchmark.hlo import Instruction, Kernel, kernels_of_loop, parse_instruction, parse_program
from capsnet_jax.errors import UsageError

# Seven steps of a convolution and a product, with their gradients, as XLA compiled them for an H100; without all that
# the reader does not use. The images are [8 7 9 32], the kernel is [5 5 32 48] with stride 2, the matrix [288 24].
SMALL_PROGRAM = Path(__file__).with_name("small_program.hlo")


@pytest.fixture(scope="module")
def kernels() -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in kernels_of_loop(parse_program(SMALL_PROGRAM.read_text()), 7)}


def test_launches_of_every_kernel_of_a_step(kernels):
    inner = {"wrapped_tanh": 3, "loop_add_fusion": 3}  # in a loop of three iterations
    outer = ["copy.6", "copy.30", "input_reduce_fusion", "fusion-start", "loop_gather_fusion", "loop_add_fusion.1"]
    outer += ["gemm_fusion_dot", "gemm_fusion_dot_general.3", "cudnn-conv.2", "cudnn-conv.3", "copy.21"]
    outer += ["input_subtract_transpose_fusion", "loop_transpose_fusion"]
    assert {name: kernel.launches for name, kernel in kernels.items()} == inner | dict.fromkeys(outer, 1)


def test_operations_of_products_and_convolutions(kernels):
    forward = 2 * (8 * 2 * 3 * 48) * (5 * 5 * 32)
    expected = {"cudnn-conv.3": forward, "cudnn-conv.2": forward}  # the gradient of the kernel costs as much
    expected |= dict.fromkeys(["gemm_fusion_dot", "gemm_fusion_dot_general.3"], 2 * 8 * 288 * 24)
    assert {name: kernel.flops for name, kernel in kernels.items() if kernel.flops} == expected
    assert {kernel.dtype for kernel in kernels.values() if kernel.flops} == {"f32"}
    assert [name for name, kernel in kernels.items() if kernel.is_convolution] == ["cudnn-conv.2", "cudnn-conv.3"]
    assert kernels["cudnn-conv.3"].kind == "__cudnn$convForward"


def test_bytes_of_every_kernel(kernels):
    batch, features, matrix, kernel = 4 * 8 * 7 * 9 * 32, 4 * 8 * 2 * 3 * 48, 4 * 288 * 24, 4 * 5 * 5 * 32 * 48
    gathered = batch + 4 * 8 + 4 + batch  # 8 of 40 images, 8 of 7 x 8 indices, and the step
    assert {name: kernel.bytes for name, kernel in kernels.items()} == {
        "copy.6": 2 * matrix,
        "copy.30": 2 * 4,
        "wrapped_tanh": 2 * matrix,
        "loop_add_fusion": 2 * 4,
        "input_reduce_fusion": matrix + 4,
        "fusion-start": 4 + 4 + 4,  # the step, and one of seven numbers, written in place
        "loop_gather_fusion": gathered,
        "gemm_fusion_dot_general.3": matrix + features,
        "cudnn-conv.2": batch + features + kernel,
        "input_subtract_transpose_fusion": 2 * kernel + 2 * kernel,
        "loop_transpose_fusion": gathered,
        "cudnn-conv.3": batch + kernel + features,
        "copy.21": 2 * kernel,
        "gemm_fusion_dot": matrix + features + matrix,
        "loop_add_fusion.1": 2 * 4,
    }


def test_paths_of_operations_are_of_the_kernel_then_of_what_is_fused_then_of_its_neighbours(kernels):
    assert kernels["gemm_fusion_dot"].operations == [
        "body/transpose(jvp(decoder))/transpose",
        "body/optimizer/sub",
        "body/routing/while",  # computed an operand
    ]
    # This one has no path of its own.
    assert kernels["input_subtract_transpose_fusion"].operations[0] == "body/optimizer/sub"
    assert "body/jvp(stem)/conv_general_dilated" in kernels["loop_transpose_fusion"].operations


def test_only_a_convolution_of_operands_with_gaps_is_dilated(kernels):
    assert [name for name, kernel in kernels.items() if kernel.is_dilated] == ["cudnn-conv.2"]
    assert not any(kernel.uses_host for kernel in kernels.values())


def kernels_in(body: str, *computations: str) -> list[Kernel]:
    """The kernels of a loop with this body."""
    called = "".join(f"%{text}\n}}\n" for text in computations)
    return kernels_of_loop(
        parse_program(
            f"{called}%body (p: f32[4]) -> f32[4] {{\n{body}\n}}\n"
            "ENTRY %main (a: f32[4]) -> f32[4] {\n"
            "  ROOT %loop = f32[4]{0} while(%a), condition=%c, body=%body, "
            'backend_config={"known_trip_count":{"n":"9"}}\n}\n'
        ),
        9,
    )


CONVOLUTION = (
    "  %p = bf16[2,3,5,7]{3,2,1,0} parameter(0)\n"
    "  %k = bf16[11,2,4,7]{3,2,1,0} parameter(1)\n"
    "  %g = bf16[2,2,2,11]{3,2,1,0} parameter(2)\n"
    "  ROOT %conv = (bf16[RESULT]{3,2,1,0}, u8[0]{0}) custom-call(OPERANDS), window={size=2x4}, "
    'dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convKIND"'
)


@pytest.mark.parametrize(
    ("kind", "operands", "result"),
    [
        ("Forward", "%p, %k", "2,2,2,11"),
        ("BiasActivationForward", "%p, %k, %g", "2,2,2,11"),
        ("BackwardFilter", "%p, %g", "11,2,4,7"),
        ("BackwardInput", "%g, %k", "2,3,5,7"),
    ],
)
def test_a_convolution_and_its_gradients_have_the_same_operations(kind, operands, result):
    text = CONVOLUTION.replace("KIND", kind).replace("OPERANDS", operands).replace("RESULT", result)
    (kernel,) = kernels_in(text)
    assert (kernel.flops, kernel.dtype) == (2 * (2 * 2 * 2 * 11) * (2 * 4 * 7), "bf16")
    assert kernel.is_convolution


@pytest.mark.parametrize(("padding", "dilated"), [("0_0x0_0_1x0_0_1x0_0", True), ("0_0x1_1_0x1_1x0_0", False)])
@pytest.mark.parametrize("between", ["bitcast(%f)", "get-tuple-element(%f), index=0"])
def test_zeros_that_a_kernel_wrote_between_the_elements_of_an_operand_are_found(padding, dilated, between):
    fused = (
        "fused (p: bf16[2,3,3,5]) -> bf16[2,5,5,5] {\n  %q = bf16[2,3,3,5] parameter(0)\n  %zero = bf16[] constant(0)\n"
        f"  ROOT %pad = bf16[2,5,5,5] pad(%q, %zero), padding={padding}"
    )
    *_, kernel = kernels_in(
        "  %p = bf16[2,3,3,5] parameter(0)\n  %k = bf16[5,2,2,5] parameter(1)\n"
        f"  %f = bf16[2,5,5,5] fusion(%p), kind=kLoop, calls=%fused\n  %b = bf16[2,5,5,5] {between}\n"
        "  ROOT %c = (bf16[2,4,4,5], u8[0]) custom-call(%b, %k), dim_labels=b01f_o01i->b01f, "
        'custom_call_target="__cudnn$convForward"',
        fused,
    )
    assert kernel.is_dilated == dilated


def test_products_and_paths_are_found_in_fusions_within_fusions():
    inner = (
        "inner (a: f32[3,5], b: f32[5,7]) -> f32[3,7] {\n  %a = f32[3,5] parameter(0)\n  %b = f32[5,7] parameter(1)\n"
        "  ROOT %d = f32[3,7] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    )
    outer = (
        "outer (x: f32[3,5], y: f32[5,7]) -> f32[3,7] {\n  %x = f32[3,5] parameter(0)\n  %y = f32[5,7] parameter(1)\n"
        '  %f = f32[3,7] fusion(%x, %y), calls=%inner, metadata={op_name="first"}\n'
        '  ROOT %n = f32[3,7] negate(%f), metadata={op_name="last"}'
    )
    (kernel,) = kernels_in(
        "  %p = f32[3,5] parameter(0)\n  %q = f32[5,7] parameter(1)\n"
        "  ROOT %k = f32[3,7] fusion(%p, %q), kind=kCustom, calls=%outer",
        inner,
        outer,
    )
    assert (kernel.flops, kernel.operations) == (2 * 3 * 5 * 7, ["last", "first"])


def test_a_product_by_a_library_has_the_operations_of_its_dimensions():
    (kernel,) = kernels_in(
        "  %p = bf16[3,5,7] parameter(0)\n  %w = bf16[3,7,11] parameter(1)\n"
        '  ROOT %g = (f32[3,5,11], s8[64]) custom-call(%p, %w), custom_call_target="__cublas$gemm", '
        'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],'
        '"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"]}}}'
    )
    assert (kernel.flops, kernel.dtype, kernel.kind) == (2 * 3 * 5 * 7 * 11, "bf16", "__cublas$gemm")
    assert kernel.bytes == 2 * 3 * 5 * 7 + 2 * 3 * 7 * 11 + 4 * 3 * 5 * 11 + 64


@pytest.mark.parametrize(
    "instruction",
    [
        "f32[4] infeed(%p)",
        "f32[4]{0:S(5)} copy(%p)",
        "((f32[4]), f32[4]{0:S(5)}, u32[]) copy-start(%p)",
        'f32[4] custom-call(%p), custom_call_target="xla_ffi_python_gpu_callback"',
        "f32[4] conditional(%p, %p), branch_computations={%nothing, %nothing}",
        "f32[4] while(%p), condition=%c, body=%nothing",
    ],
)
def test_whatever_the_host_takes_part_in_is_found(instruction):
    nothing = "nothing (p: f32[4]) -> f32[4] {\n  ROOT %p = f32[4] parameter(0)"
    kernels = kernels_in(f"  %p = f32[4]{{0}} parameter(0)\n  ROOT %x = {instruction}", nothing)
    assert [kernel.uses_host for kernel in kernels] == [True]


def test_kernels_of_called_computations_are_launched_as_often_as_they_are_called():
    inner = "inner (q: f32[4]) -> f32[4] {\n  %q = f32[4] parameter(0)\n  ROOT %n = f32[4] negate(%q)"
    kernels = kernels_in(
        "  %p = f32[4]{0} parameter(0)\n  %x = f32[4] call(%p), to_apply=%inner\n"
        '  %y = f32[4] while(%x), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"5"}}\n'
        "  ROOT %z = f32[4] conditional(%y, %y), branch_computations={%inner, %inner}",
        inner,
    )
    assert [(kernel.name, kernel.launches) for kernel in kernels if not kernel.uses_host] == [
        ("n", 1),
        ("n", 5),
        ("n", 1),
        ("n", 1),
    ]


@pytest.mark.parametrize(
    ("array", "size"),
    [("f32[3,5]{1,0}", 60), ("pred[7]", 7), ("bf16[]", 2), ("s4[3]", 2), ("f8e4m3fn[5]{0}", 5), ("c64[2]", 16)],
)
def test_bytes_of_arrays(array, size):
    assert parse_instruction(f"  %x = {array} add(%a, %b)").bytes == size
    assert parse_instruction(f"  %x = ({array}, /*index=1*/{array}, token[]) tuple(%a)").bytes == 2 * size


def test_an_instruction_is_taken_apart():
    line = '  ROOT %x.1 = (f32[2]{0}, u8[0]) custom-call(f32[2] %a.b, %c-d), calls=%f, metadata={op_name="jit(f)/g"}'
    instruction = parse_instruction(line)
    assert instruction == Instruction(
        "x.1", "(f32[2]{0}, u8[0])", "custom-call", ["a.b", "c-d"], ', calls=%f, metadata={op_name="jit(f)/g"}', True
    )
    assert instruction.called == ["f"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "The text has no ENTRY computation; expected an HLO program"),
        (
            "ENTRY %main () -> f32[] {\n  ROOT %x\n}\n",
            "Line 2 of the HLO program is 'ROOT %x'; expected an instruction",
        ),
        ("ENTRY %main () -> f32[] {\n  %x = f32[] add(%y\n}\n", "Line 2 of the HLO program is '%x = f32"),
        (
            "ENTRY %main () -> f32[] {\n  ROOT %x = f32[] constant(1)\n}\n",
            "The HLO program has no loop of 9 iterations",
        ),
    ],
)
def test_a_text_that_is_not_understood_is_refused(text, message):
    with pytest.raises(UsageError) as error:
        kernels_of_loop(parse_program(text), 9)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("line", ["dot(%p, %p)", "fusion(%p), kind=kLoop", "custom-call(%q)", "negate(%missing)"])
def test_an_instruction_of_unknown_form_is_refused(line):
    with pytest.raises(UsageError, match=r"The HLO instruction x is a [a-z\-]+ of unknown form; expected"):
        kernels_in(f"  %p = f32[4] parameter(0)\n  ROOT %x = f32[4] {line}")
