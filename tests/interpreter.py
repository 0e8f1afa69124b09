"""Triton's interpreter: kernels on the CPU, in a process that sets TRITON_INTERPRET=1 first."""

import os
import subprocess
import sys


def run(file: str, cases: str) -> None:
    """Run a test file's `cases` (pytest's -k) in the interpreter; none may be skipped."""
    command = [sys.executable, "-m", "pytest", file, "-q", "-k", cases, "-p", "no:cacheprovider"]
    path = os.pathsep.join(filter(None, sys.path))
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0 and "skipped" not in run.stdout, run.stdout + run.stderr


def mend() -> None:
    """Triton 3.6's truncates fp32 to bf16 where a GPU rounds, and multiplies bf16 as integers."""
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(x, source, target, rounding):
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = torch.from_numpy(x.view(np.float32).copy()).bfloat16().view(torch.int16)
            return bits.numpy().view(np.uint16).reshape(x.shape)
        return convert(x, source, target, rounding)

    def wide(x):
        if x.dtype != tl.bfloat16:
            return x.data
        return convert(x.data, tl.bfloat16, tl.float32, None).view(np.float32)

    def dot(self, a, b, sums, *_):
        product = np.matmul(wide(a), wide(b), dtype=sums.data.dtype)
        return interpreter.TensorHandle(product + sums.data, sums.dtype.scalar)

    interpreter._convert_float = rounded
    interpreter.InterpreterBuilder.create_dot = dot
