"""Read a program that XLA has compiled for a GPU: its kernels, their floating-point operations and bytes.

The text is optimized HLO, as `jax.stages.Compiled.as_text` returns it. Every instruction outside fused computations is
one kernel, unless it only names memory.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from capsnet_jax.errors import UsageError

KNOWN = "JAX 0.10 to 0.12 print it"
# Instructions that launch nothing; those that end with "-done" wait for a kernel that was counted when it started.
NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"}
HOST_OPCODES = {"infeed", "outfeed", "send", "recv"}
HOST_MEMORY = "S(5)"  # memory space of the host, in the layout of an array
CALLED = re.compile(
    r"\b(?:calls|to_apply|body|true_computation|false_computation|branch_computations)=(\{.*?\}|%[\w.\-]+)"
)


class Array(NamedTuple):
    """Dtype and sizes of an array."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = 8 if self.dtype == "pred" else int(re.findall(r"\d+", self.dtype)[0])
        return -(-math.prod(self.sizes) * bits // 8)


class Instruction(NamedTuple):
    """An instruction: its name, the text of its type, its opcode, operands by name, and all text that follows."""

    name: str
    type: str
    opcode: str
    operands: list[str]
    attributes: str
    is_root: bool

    @property
    def arrays(self) -> list[Array]:
        """The arrays of the result."""
        found = re.findall(r"\b(pred|[a-z]+\d\w*)\[([\d,]*)\]", self.type)
        return [Array(dtype, tuple(map(int, filter(None, sizes.split(","))))) for dtype, sizes in found]

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def called(self) -> list[str]:
        """Computations that the instruction calls, by name."""
        return [name for names in CALLED.findall(self.attributes) for name in re.findall(r"%([\w.\-]+)", names)]

    def attribute(self, pattern: str) -> str:
        """Find the first group of a pattern in the attributes; empty if it is not there."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]


class Program(NamedTuple):
    """A program: all computations by name, and the name of the first one that runs."""

    computations: dict[str, Computation]
    entry: str


class Kernel(NamedTuple):
    """A kernel of a loop.

    Attributes:
        name: name of its instruction.
        kind: opcode, or target of a custom call.
        operations: paths of operations in the traced program, as in "jit(train_chunk)/while/body/optimizer/add": its
            own, those fused into it, from the last to the first, then those of its users and of its operands.
        launches: number of launches in an iteration of the loop.
        flops: floating-point operations of its matrix products or convolution, in a launch.
        dtype: dtype of their operands; empty without any.
        bytes: bytes that a launch reads and writes, each operand once.
        is_convolution: whether it is a convolution.
        is_dilated: whether it is a convolution of operands with zeros between their elements.
        uses_host: whether it exchanges data with the host, or the host must wait for its result.
    """

    name: str
    kind: str
    operations: list[str]
    launches: int
    flops: int
    dtype: str
    bytes: int
    is_convolution: bool = False
    is_dilated: bool = False
    uses_host: bool = False


def parse_program(text: str) -> Program:
    """Parse the text of a program.

    Raises:
        UsageError: the text is not understood.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for number, line in enumerate(text.splitlines(), 1):
        if start := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations.setdefault(start[2], {})
            entry = start[2] if start[1] else entry
        elif line == "}":
            current = None
        elif current is not None and line.strip():
            try:
                instruction = parse_instruction(line)
            except (IndexError, TypeError, ValueError) as error:
                raise UsageError(
                    f"Line {number} of the HLO program is {line.strip()[:80]!r}; expected an instruction, as {KNOWN}."
                ) from error
            current[instruction.name] = instruction
    if not entry:
        raise UsageError(f"The text has no ENTRY computation; expected an HLO program, as {KNOWN}.")
    return Program(computations, entry)


def parse_instruction(line: str) -> Instruction:
    """Parse a line such as `ROOT %sum = f32[3]{0} add(%a, %b), metadata={...}`.

    Raises:
        ValueError: the line has another form.
    """
    left, rest = line.strip().split(" = ", 1)
    *root, name = left.split()
    end = end_of_brackets(rest) if rest.startswith("(") else rest.index(" ")
    of_type, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    end = start + end_of_brackets(rest[start:])
    operands = re.findall(r"%([\w.\-]+)", rest[start:end])
    return Instruction(name.removeprefix("%"), of_type, rest[:start], operands, rest[end:], root == ["ROOT"])


def end_of_brackets(text: str) -> int:
    """Find the end of the bracket that text starts with.

    Raises:
        ValueError: there is none.
    """
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return place + 1
    raise ValueError("The bracket is not closed.")


def kernels_of_loop(program: Program, length: int) -> list[Kernel]:
    """List the kernels of an iteration of the loop with this number of iterations.

    Raises:
        UsageError: the program has no such loop, or an instruction in it is not understood.
    """
    for instruction in program.computations[program.entry].values():
        if instruction.opcode == "while" and trip_count(instruction) == length:
            (body,) = instruction.called
            return list(kernels_of(program, body))
    raise UsageError(f"The HLO program has no loop of {length} iterations; expected the loop over training steps.")


def kernels_of(program: Program, name: str, launches: int = 1) -> Iterator[Kernel]:
    """List the kernels of a computation that runs several times, with those of the computations that it calls."""
    computation = program.computations[name]
    for instruction in computation.values():
        opcode = instruction.opcode
        if opcode in NO_KERNEL or opcode.endswith("-done"):
            continue
        if opcode in ("while", "conditional", "call", "async-start"):
            trips = trip_count(instruction) if opcode == "while" else 1
            if opcode == "conditional" or not trips:  # the host waits for the condition
                operations = operations_of(program, computation, instruction)
                yield Kernel(instruction.name, opcode, operations, launches, 0, "", 0, uses_host=True)
            for called in instruction.called:
                yield from kernels_of(program, called, launches * max(trips, 1))
        else:
            try:
                yield kernel(program, computation, instruction, launches)
            except (IndexError, KeyError, ValueError) as error:
                raise UsageError(
                    f"The HLO instruction {instruction.name} is a {opcode} of unknown form; expected one as {KNOWN}."
                ) from error


def kernel(program: Program, computation: Computation, instruction: Instruction, launches: int) -> Kernel:
    """Describe the kernel of an instruction."""
    operands = [computation[name] for name in instruction.operands]
    target = instruction.attribute(r'custom_call_target="([^"]*)"')
    is_convolution = target.startswith("__cudnn$conv") or instruction.opcode == "convolution"
    if instruction.opcode.startswith("fusion"):
        (fused,) = instruction.called
        products = list(products_in(program, fused))
        size = bytes_of_fusion(program.computations[fused])
    else:
        products = []
        if is_convolution:
            products = [convolution_flops(instruction, operands)]
        elif instruction.opcode == "dot" or "gemm" in target or "matmul" in target:
            products = [product_flops(instruction, operands[0])]
        size = bytes_of_fusion(
            {each.name: each._replace(opcode="parameter") for each in operands}
            | {instruction.name: instruction._replace(is_root=True)}
        )
    return Kernel(
        name=instruction.name,
        kind=target or instruction.opcode.removesuffix("-start"),
        operations=operations_of(program, computation, instruction),
        launches=launches,
        flops=sum(flops for flops, _ in products),
        dtype=max(products, default=(0, ""))[1],
        bytes=size,
        is_convolution=is_convolution,
        is_dilated=is_convolution and is_dilated(program, computation, instruction),
        uses_host=instruction.opcode.removesuffix("-start") in HOST_OPCODES
        or "callback" in target
        or any(HOST_MEMORY in each.type for each in (instruction, *operands)),
    )


def operations_of(program: Program, computation: Computation, instruction: Instruction) -> list[str]:
    """List the paths of an instruction, of those fused into it, of its users and of its operands; each once."""
    is_fusion = instruction.opcode.startswith("fusion")
    fused = list(program.computations[instruction.called[0]].values()) if is_fusion else []
    users = [each for each in computation.values() if instruction.name in each.operands]
    near = [instruction, *reversed(fused), *users, *(computation[name] for name in instruction.operands)]
    return list(dict.fromkeys(filter(None, (each.attribute(r'op_name="([^"]*)"') for each in near))))


def trip_count(instruction: Instruction) -> int:
    """Return the number of iterations of a loop; 0 if it is not known before the program runs."""
    return int(instruction.attribute(r'"known_trip_count":\{"n":"(\d+)"') or 0)


def products_in(program: Program, name: str) -> Iterator[tuple[int, str]]:
    """List the operations and the dtype of each matrix product in a fused computation, and in those that it calls."""
    computation = program.computations[name]
    for instruction in computation.values():
        if instruction.opcode == "dot":
            yield product_flops(instruction, computation[instruction.operands[0]])
        elif instruction.opcode == "fusion":
            for called in instruction.called:
                yield from products_in(program, called)


def product_flops(instruction: Instruction, left: Instruction) -> tuple[int, str]:
    """Count the operations of a matrix product, two per multiplication, and tell the dtype of its operands."""
    (axes,) = re.findall(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)', instruction.attributes)
    operand = left.arrays[0]
    summed = math.prod(operand.sizes[int(axis)] for axis in re.findall(r"\d+", axes))
    return 2 * math.prod(instruction.arrays[0].sizes) * summed, operand.dtype


def convolution_flops(instruction: Instruction, operands: list[Instruction]) -> tuple[int, str]:
    """Count the operations of a convolution, forward or for a gradient, and tell the dtype of its operands."""
    left, right = (each.arrays[0] for each in operands[:2])
    result = instruction.arrays[0]
    if "BackwardFilter" in instruction.attributes:
        features, kernel = right, result
    elif "BackwardInput" in instruction.attributes:
        features, kernel = left, right
    else:
        features, kernel = result, right
    # Each of the features is a sum over all of the kernel that belongs to its channel.
    channel = instruction.attribute(r"dim_labels=\w+_(\w+)->").index("o")
    return 2 * math.prod(features.sizes) * math.prod(kernel.sizes) // kernel.sizes[channel], left.dtype


def is_dilated(program: Program, computation: Computation, instruction: Instruction) -> bool:
    """Whether there are zeros between the elements of an operand of a convolution, by its window or in memory."""
    if re.search(r"window=\{[^}]*\b[lr]hs_dilate=", instruction.attributes):
        return True
    for name in instruction.operands:
        while computation[name].opcode in ("bitcast", "copy", "get-tuple-element"):
            (name,) = computation[name].operands
        for called in computation[name].called:
            for each in program.computations[called].values():
                padding = each.attribute(r"padding=([\d\-_x]+)") if each.opcode == "pad" else ""
                if any(axis.count("_") == 2 and not axis.endswith("_0") for axis in padding.split("x")):
                    return True
    return False


def bytes_of_fusion(computation: Computation) -> int:
    """Count the bytes that a fused computation reads and writes: each operand once, of slices only what is sliced."""
    read = sum(bytes_read(computation, each) for each in computation.values() if each.opcode == "parameter")
    (root,) = (each for each in computation.values() if each.is_root)
    return read + bytes_written(computation, root)


def bytes_read(computation: Computation, instruction: Instruction) -> int:
    """Count the bytes of a value that other instructions read."""
    total = 0
    for user in computation.values():
        if instruction.name not in user.operands:
            continue
        is_first = user.operands[0] == instruction.name
        if user.opcode in ("slice", "dynamic-slice", "gather") and is_first:
            total += user.bytes
        elif user.opcode == "bitcast":
            total += bytes_read(computation, user)
        elif not (user.opcode == "dynamic-update-slice" and is_first):  # which writes in place
            total += instruction.bytes
    return min(total, instruction.bytes)


def bytes_written(computation: Computation, instruction: Instruction) -> int:
    """Count the bytes of a result that are written."""
    if instruction.opcode == "tuple":
        return sum(bytes_written(computation, computation[name]) for name in instruction.operands)
    if instruction.opcode == "bitcast" and instruction.operands[0] in computation:
        return bytes_written(computation, computation[instruction.operands[0]])
    if instruction.opcode == "dynamic-update-slice":
        return computation[instruction.operands[1]].bytes
    return instruction.bytes
