"""ctypes mirrors of the structs that the C kernels take.

Each class has the fields of the C struct that its docstring names, in the same order. A field that
is a tensor is its address (`address`); the tensor must stay alive during the call. Sizes count
elements, not bytes. Shape letters: T packed tokens, S sequences, H query heads, K KV heads, d head
dimension, P pages, N outputs of a linear layer.
"""

import ctypes

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
"""FP32 and BF16 of cpu.h: the values of fields named `dtype` or `*_dtype`."""
BIT_CODES = {8: 2, 4: 3}
"""INT8 and INT4 of cpu.h: the values of fields named `format`, which can also be a dtype code."""
GROUPED = 4
"""GROUPED of cpu.h: a weight on a uniform grid, as files store it (`grouped.c`)."""
SCALE_CODES = {torch.float16: 5, torch.bfloat16: 1}
"""FP16 and BF16 of cpu.h: dtypes of scales."""

POINTER, INT, LONG, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float


def address(x: Tensor | None) -> int | None:
    """Returns a tensor's address, or None (NULL in C) if there is no tensor."""
    return None if x is None else x.data_ptr()


def has_contiguous_heads(x: Tensor) -> bool:
    """Returns whether the heads of each token of `x: [T, H, d]` are contiguous in memory."""
    return x.stride(2) == 1 and x.stride(1) == x.shape[2]


class RmsNormForward(ctypes.Structure):
    """Arguments of `rms_norm_forward`: `RmsNormForward` in training.c.

    Attributes:
        x: [rows, width], fp32.
        added: tensor added to `x` first, [rows, width] in `added_dtype`, or None.
        sum: result x + added, [rows, width], fp32; not written if `added` is None.
        weight: [width], fp32.
        y: result, [rows, width] in `y_dtype`.
        inverse: result 1/r of each row, [rows], fp32.
        added_dtype: dtype code; ignored if `added` is None.
        y_dtype: dtype code.
        rows: number of rows.
        width: elements of a row.
        eps: added to the mean of squares.
    """

    _fields_ = [
        *((name, POINTER) for name in ("x", "added", "sum", "weight", "y", "inverse")),
        *((name, INT) for name in ("added_dtype", "y_dtype")),
        *((name, LONG) for name in ("rows", "width")),
        ("eps", FLOAT),
    ]


class RmsNormBackward(ctypes.Structure):
    """Arguments of `rms_norm_backward`: `RmsNormBackward` in training.c.

    Attributes:
        grad: gradient of `y`, [rows, width] in `grad_dtype`.
        x: input of the norm (the sum, if a tensor was added), [rows, width], fp32.
        weight: [width], fp32.
        inverse: 1/r of the forward pass, [rows], fp32.
        grad_sum: gradient of the sum from its other uses, [rows, width], fp32, or None.
        grad_x: result, [rows, width], fp32.
        grad_added: result: the values of `grad_x` in `added_dtype`, [rows, width], or None.
        grad_weight: result, [width], fp32, or None.
        grad_dtype: dtype code.
        added_dtype: dtype code; ignored if `grad_added` is None.
        rows: number of rows.
        width: elements of a row.
    """

    _fields_ = [
        *((name, POINTER) for name in ("grad", "x", "weight", "inverse", "grad_sum")),
        *((name, POINTER) for name in ("grad_x", "grad_added", "grad_weight")),
        *((name, INT) for name in ("grad_dtype", "added_dtype")),
        *((name, LONG) for name in ("rows", "width")),
    ]


class Rotary(ctypes.Structure):
    """Arguments of `rotary`: `Rotary` in training.c.

    Attributes:
        x: [rows, heads, 2 half] in `dtype`, with contiguous heads.
        y: result, [rows, heads, 2 half] in `dtype`, contiguous.
        cosine: [rows, half], fp32.
        sine: [rows, half], fp32.
        x_stride: elements from row to row of `x`.
        rows: number of rows (tokens).
        heads: heads of a row.
        half: rotated pairs of a head.
        dtype: dtype code.
        sign: 1, or -1 for the inverse rotation.
    """

    _fields_ = [
        *((name, POINTER) for name in ("x", "y", "cosine", "sine")),
        *((name, LONG) for name in ("x_stride", "rows", "heads", "half")),
        ("dtype", INT),
        ("sign", FLOAT),
    ]


class AdamWScalars(ctypes.Structure):
    """Scalars of `adamw` and `adamw_int8`: `AdamW` in update.c.

    Attributes:
        scale: factor of the gradient.
        rescale: 1 - learning rate * weight decay, the factor of the weights.
        beta1_rest: 1 - beta1.
        beta2: decay of the second moment.
        beta2_rest: 1 - beta2.
        correction: sqrt(1 - beta2^step).
        eps: added to the root of the second moment.
        step_size: learning rate / (1 - beta1^step).
    """

    _fields_ = [
        *((name, FLOAT) for name in ("scale", "rescale", "beta1_rest", "beta2", "beta2_rest")),
        *((name, FLOAT) for name in ("correction", "eps", "step_size")),
    ]


class AdamWInt8Tensors(ctypes.Structure):
    """Tensors of `adamw_int8`: `AdamWInt8` in update.c.

    Attributes:
        master: weights, [count], fp32, updated in place.
        mean: codes of the first moment, [count], int8, updated in place.
        square: codes of the second moment, [count], uint8, updated in place.
        mean_scales: [blocks of 256 weights], fp32, updated in place.
        square_scales: [blocks of 256 weights], fp32, updated in place.
        offset: dither in [0, 1), [256], fp32.
        gradient: [count] in `dtype`.
        copy: receives the new weights, [count], bf16, or None.
        count: number of weights.
        dtype: dtype code of the gradient.
    """

    _fields_ = [
        *((name, POINTER) for name in ("master", "mean", "square", "mean_scales")),
        *((name, POINTER) for name in ("square_scales", "offset", "gradient", "copy")),
        ("count", LONG),
        ("dtype", INT),
    ]


class AttentionShape(ctypes.Structure):
    """Sizes and rule of packed attention: `Shape` in attention.h.

    Attributes:
        heads: query heads H.
        kv_heads: KV heads K, a divisor of H.
        dim: head dimension d, a multiple of 16.
        q_stride: elements from token to token of the queries.
        k_stride: the same for the keys.
        v_stride: the same for the values.
        dtype: dtype code of all tensors except the log-sum-exp, which is fp32.
        scale: factor of the scores.
        causal: whether a query sees only keys up to its own position.
        window: most recent keys that a query sees; 0 for all.
    """

    _fields_ = [
        *((name, LONG) for name in ("heads", "kv_heads", "dim")),
        *((name, LONG) for name in ("q_stride", "k_stride", "v_stride")),
        ("dtype", INT),
        ("scale", FLOAT),
        ("causal", INT),
        ("window", LONG),
    ]


class AttentionBackward(ctypes.Structure):
    """Tensors of `attention_backward`: `AttentionBackward` in attention.h.

    Attributes:
        grad: gradient of the output, [T, H, d], contiguous.
        out: output of the forward pass, [T, H, d], contiguous.
        q: queries of the forward pass, [T, H, d].
        k: keys of the forward pass, [T, K, d].
        v: values of the forward pass, [T, K, d].
        lse: log-sum-exp of the forward pass, [T, H], fp32.
        grad_q: result, [T, H, d], contiguous.
        grad_k: result, [T, K, d], contiguous.
        grad_v: result, [T, K, d], contiguous.
        starts: cu_seqlens, [S + 1], int64.
        num_sequences: S.
    """

    _fields_ = [
        *((name, POINTER) for name in ("grad", "out", "q", "k", "v", "lse")),
        *((name, POINTER) for name in ("grad_q", "grad_k", "grad_v", "starts")),
        ("num_sequences", LONG),
    ]


class Block(ctypes.Structure):
    """One of the joined matrices of a GEMM: `Block` in gemm.c.

    Attributes:
        data: address of the first element.
        stride: elements from row to row.
        size: rows or columns along the joined dimension.
    """

    _fields_ = [("data", POINTER), ("stride", LONG), ("size", LONG)]


class Gemm(ctypes.Structure):
    """Arguments of `gemm`, C = A B + bias: `Gemm` in gemm.c.

    Attributes:
        a: array of `a_count` blocks, which are A [rows, depth], bf16.
        b: array of `b_count` blocks, which are B [depth, columns], bf16.
        c: array of as many blocks as the joined operand has, or one if both are joined: C
            [rows, columns] in `c_dtype`.
        a_count: number of blocks of A.
        b_count: number of blocks of B.
        a_transposed: whether A is stored as [depth, rows].
        b_transposed: whether B is stored as [columns, depth].
        bias: [columns], fp32, or None.
        c_dtype: dtype code.
        add: whether the product is added to C, which must be fp32.
        rows: rows of C.
        columns: columns of C.
        depth: inputs, over which products are summed.
        workspace: address of `gemm_bytes` bytes, aligned to 64 bytes.
    """

    _fields_ = [
        *((name, ctypes.POINTER(Block)) for name in ("a", "b", "c")),
        *((name, LONG) for name in ("a_count", "b_count")),
        *((name, INT) for name in ("a_transposed", "b_transposed")),
        ("bias", POINTER),
        *((name, INT) for name in ("c_dtype", "add")),
        *((name, LONG) for name in ("rows", "columns", "depth")),
        ("workspace", POINTER),
    ]


class Pages(ctypes.Structure):
    """Pages of a KV cache: `Pages` in paged.h.

    Attributes:
        keys: [P, K, page_size, d] in `format`.
        values: the same for the values.
        key_scales: int8: [P, K, page_size]; int4: [P, K, page_size, 2], scale and minimum; fp32.
        value_scales: the same for the values.
        kv_heads: K.
        page_size: tokens of a page, a multiple of 8.
        dim: head dimension d, a multiple of 8.
        format: dtype code or bit code.
    """

    _fields_ = [
        *((name, POINTER) for name in ("keys", "values", "key_scales", "value_scales")),
        *((name, LONG) for name in ("kv_heads", "page_size", "dim")),
        ("format", INT),
    ]


class Queries(ctypes.Structure):
    """What all queries of a call of `paged_attention` share: `Queries` in paged_attention.c.

    Attributes:
        heads: query heads H.
        q_stride: elements from token to token of the queries.
        dtype: dtype code of queries and outputs.
        scale: factor of the scores.
        window: most recent keys that a query sees; 0 for all.
        slopes: ALiBi slopes, [H], fp32, or None.
    """

    _fields_ = [
        *((name, LONG) for name in ("heads", "q_stride")),
        ("dtype", INT),
        ("scale", FLOAT),
        ("window", LONG),
        ("slopes", ctypes.POINTER(FLOAT)),
    ]


class PagedBatch(ctypes.Structure):
    """Sequences of a call of `paged_attention`: `PagedBatch` in paged_attention.c.

    Attributes:
        q: queries of all sequences, [T, H, d], with contiguous heads.
        out: result, [T, H, d], contiguous.
        table: page tables, [S, table_width], int32.
        lengths: tokens of each sequence in `q`, [S], int64.
        key_lengths: tokens of each sequence in the cache, [S], int64.
        table_width: pages of a row of the table.
        num_sequences: S.
    """

    _fields_ = [
        *((name, POINTER) for name in ("q", "out", "table")),
        *((name, ctypes.POINTER(LONG)) for name in ("lengths", "key_lengths")),
        *((name, LONG) for name in ("table_width", "num_sequences")),
    ]


class Matrix(ctypes.Structure):
    """A weight matrix: `Matrix` in matrix.h, which describes the layouts.

    Attributes:
        data: weights in `format`.
        scales: int8: [N padded to a multiple of 8], fp32; else None.
        bias: [N], fp32, or None.
        outputs: N.
        inputs: inputs of the layer.
        format: dtype code, bit code or `GROUPED`.
        bits: grouped: bits of a code.
        scale_type: grouped: code of the scales' dtype (`SCALE_CODES`).
        shift: grouped: 0 for codes around the middle one, 1 for zero points, 2 for minima.
        span: grouped: groups of 32 inputs that share a scale.
    """

    _fields_ = [
        *((name, POINTER) for name in ("data", "scales", "bias")),
        *((name, LONG) for name in ("outputs", "inputs")),
        *((name, INT) for name in ("format", "bits", "scale_type", "shift")),
        ("span", LONG),
    ]


class LowRankUpdate(ctypes.Structure):
    """The low-rank update of a matrix, y += scale B (A x): `Update` in low_rank.h.

    Attributes:
        down: A, [rank, inputs]; without outputs, the matrix is not changed.
        up: B, [outputs, rank].
        scale: s.
    """

    _fields_ = [("down", Matrix), ("up", Matrix), ("scale", FLOAT)]


class LowRankUpdates(ctypes.Structure):
    """Arguments of `low_rank_updates`: `LowRankUpdates` in low_rank.c.

    Attributes:
        x: [T, inputs] in `dtype`.
        y: [T, outputs] in `dtype`, changed in place.
        updates: array of `LowRankUpdate`, one per group of rows.
        starts: first row of each group in `rows`, [num_groups + 1], int64.
        rows: numbers of the rows, group by group, int64.
        num_groups: number of groups.
        inputs, outputs: elements of a row of x and of y.
        dtype: dtype code of x, y and the matrices of the updates.
    """

    _fields_ = [
        *((name, POINTER) for name in ("x", "y")),
        ("updates", ctypes.POINTER(LowRankUpdate)),
        *((name, POINTER) for name in ("starts", "rows")),
        *((name, LONG) for name in ("num_groups", "inputs", "outputs")),
        ("dtype", INT),
    ]


class Blockwise4(ctypes.Structure):
    """A weight in blocks of 4-bit codes: `Blockwise4` in blockwise4.c, which describes the layout.

    Attributes:
        codes: two codes per byte, [N K / 2] rounded up, uint8.
        absmax: scale of each block: fp32, or uint8 codes if `nested_map` is not None.
        nested_map: values of the codes of `absmax`, [256], fp32, or None.
        nested_absmax: scale of 256 codes of `absmax`, fp32, or None.
        nested_offset: added to every dequantized scale, one fp32 value, or None.
        codebook: values of the codes, [16], fp32.
        outputs: N.
        inputs: K.
    """

    _fields_ = [
        *((name, POINTER) for name in ("codes", "absmax", "nested_map", "nested_absmax")),
        *((name, POINTER) for name in ("nested_offset", "codebook")),
        *((name, LONG) for name in ("outputs", "inputs")),
    ]
