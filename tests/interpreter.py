"""Triton's interpreter as near to a GPU as tests need it: TRITON_INTERPRET=1 must be set before Triton is imported.

Triton 3.6's truncates where a GPU rounds fp32 to bf16, and multiplies bf16 matrices as if their bits were integers.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_convert = interpreter._convert_float


def _convert_float(x, source, target, rounding):
    if (source, target) == (tl.float32, tl.bfloat16):
        bits = torch.from_numpy(x.view(np.float32).copy()).bfloat16().view(torch.int16)
        return bits.numpy().view(np.uint16).reshape(x.shape)
    return _convert(x, source, target, rounding)


def _dot(self, a, b, sums, *_):
    def wide(x):
        return _convert(x.data, tl.bfloat16, tl.float32, None).view(np.float32) if x.dtype == tl.bfloat16 else x.data

    product = np.matmul(wide(a), wide(b), dtype=sums.data.dtype)
    return interpreter.TensorHandle(product + sums.data, sums.dtype.scalar)


interpreter._convert_float = _convert_float
interpreter.InterpreterBuilder.create_dot = _dot
