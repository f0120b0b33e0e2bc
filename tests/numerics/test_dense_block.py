"""Dense GEMM kernel (dense.c) built for several CPUs: accuracy and batch invariance."""

import ctypes
import platform
import shutil
import subprocess

import pytest
import torch

from easyllm.core.device import cpu_features
from easyllm.ops.kernels import build
from easyllm.ops.kernels.build import FLAGS
from easyllm.ops.kernels.structs import DTYPE_CODES, Matrix

pytestmark = pytest.mark.usefixtures("two_threads")  # kernels split their work

OUTPUTS = 8
LEVELS = {"x86-64": None, "x86-64-v3": "avx2", "native": None}
"""Build targets of the kernel, and the CPU feature that each requires."""


class Rows(ctypes.Structure):
    """The `Rows` struct of matrix.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("values", "packed", "codes", "terms")),
        *((name, ctypes.c_int64) for name in ("inputs", "groups")),
    ]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """dense.c compiled for each level, by name."""
    if build._library() is None or platform.machine() != "x86_64":
        pytest.skip("no C compiler on this machine, or another kind of processor")
    compiler = shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    folder, source = tmp_path_factory.mktemp("dense"), build.__file__
    found = {}
    for level, needed in LEVELS.items():
        if needed and needed not in cpu_features():
            continue
        flags = [f"-march={level}" if flag.startswith("-march") else flag for flag in FLAGS]
        target = folder / f"{level}.so"
        here = source.replace("build.py", "dense.c")
        subprocess.run(
            [compiler, *flags, "-shared", here, "-o", str(target), "-lm"],
            check=True,
            capture_output=True,
        )
        found[level] = ctypes.CDLL(str(target))
    return found


def products(kernel, x, weight, bias):
    """Returns x Wᵀ + b, computed block by block; `x: [M, K]` fp32."""
    (rows, inputs), outputs = x.shape, len(weight)
    # space for whole registers of rows: anything not written stays NaN
    packed = torch.full(((rows + 1) * inputs + 16,), float("nan"))
    struct = Rows(x.data_ptr(), packed.data_ptr(), None, None, inputs, 0)
    matrix = Matrix(
        weight.data_ptr(),
        None,
        None if bias is None else bias.data_ptr(),
        outputs,
        inputs,
        DTYPE_CODES[weight.dtype],
    )
    number = ctypes.c_int64
    for row in range(rows):
        kernel.pack_values(
            ctypes.byref(struct), number(row), number(rows), number(0), number(inputs)
        )
    if packed.isnan().all():  # a register contains a single row: values are used in place
        struct.packed = x.data_ptr()
    out = torch.full((rows, outputs), float("nan"))
    for block in range(-(-outputs // OUTPUTS)):
        to = ctypes.c_void_p(out.data_ptr() + 4 * OUTPUTS * block)
        kernel.dense_block(
            ctypes.byref(matrix),
            number(block),
            ctypes.byref(struct),
            number(rows),
            to,
            number(outputs),
        )
    return out


def operands(rows, outputs, inputs, dtype):
    generator = torch.Generator().manual_seed(rows + outputs + inputs)
    x = torch.randn(rows, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    return x, weight, torch.randn(outputs, generator=generator)


SHAPES = [
    (1, 8, 8),
    (4, 11, 3),
    (67, 9, 7),
    (2, 16, 40),
    (3, 11, 37),
    (5, 24, 576),
    (7, 9, 1100),
    (8, 8, 512),
    (31, 40, 520),
    (32, 16, 1536),
    (65, 8, 100),
    (130, 12, 1031),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_match_fp64(kernels, shape, dtype):
    x, weight, bias = operands(*shape, dtype)
    wanted = x.double() @ weight.double().T
    scale = x.double().abs() @ weight.double().abs().T
    for kernel in kernels.values():
        for added in (None, bias):
            found = products(kernel, x, weight, added).double()
            exact = wanted if added is None else wanted + added.double()
            assert ((found - exact).abs() <= 2e-6 * scale + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_bitwise_independent_of_the_number_of_rows(kernels, shape, dtype):
    x, weight, bias = operands(*shape, dtype)
    for kernel in kernels.values():
        together = products(kernel, x, weight, bias)
        for count in {1, 2, 3, 4, 7, len(x) - 1} & set(range(1, len(x))):
            start = len(x) - count
            assert torch.equal(products(kernel, x[start:].clone(), weight, bias), together[start:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_bitwise_independent_of_the_register_width(kernels, dtype):
    if not {"x86-64-v3", "native"} <= set(kernels):
        pytest.skip("the processor has no AVX2")
    for shape in SHAPES:
        x, weight, bias = operands(*shape, dtype)
        narrow, wide = (products(kernels[n], x, weight, bias) for n in ("x86-64-v3", "native"))
        assert torch.equal(narrow, wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_stay_in_their_row(kernels, dtype):
    x, weight, _ = operands(7, 16, 40, dtype)
    for kernel in kernels.values():
        clean = products(kernel, x, weight, None)
        spoilt = x.clone()
        spoilt[2, 5], spoilt[6, 39] = float("nan"), float("inf")
        found = products(kernel, spoilt, weight, None)
        rest = [0, 1, 3, 4, 5]
        assert torch.equal(found[rest], clean[rest])
        assert found[2].isnan().all()
        assert not found[6].isfinite().any()
