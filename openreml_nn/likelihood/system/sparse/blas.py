"""BLAS and LAPACK, as SciPy brings them, for compiled code.

Their addresses are arguments of the compiled functions and not constants of them, so that what
numba compiled once can be kept on disk for the next process.
"""

from __future__ import annotations

import ctypes
from importlib import import_module
from typing import Any

import numpy as np

from openreml_nn.support.compilation import compiled, inlined

__all__ = ["ROUTINES", "gemm", "potrf", "potri", "solve", "symm", "syrk", "trsm"]

_NAMES = (
    ("scipy.linalg.cython_blas", "dgemm"),
    ("scipy.linalg.cython_blas", "dtrsm"),
    ("scipy.linalg.cython_blas", "dsymm"),
    ("scipy.linalg.cython_lapack", "dpotrf"),
    ("scipy.linalg.cython_lapack", "dpotri"),
    ("scipy.linalg.cython_blas", "dsyrk"),
    ("scipy.linalg.cython_blas", "dtrsv"),
)


def _address(module: str, name: str) -> int:
    """Address of a function that Cython exports."""
    capsule = import_module(module).__pyx_capi__[name]
    name_of = ctypes.pythonapi.PyCapsule_GetName
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return int(pointer_of(capsule, name_of(capsule)))


#: Addresses of the routines, in the order of the names above.
ROUTINES = np.array([_address(*name) for name in _NAMES], dtype=np.int64)


@inlined
def _call(context: Any, address: Any, arguments: Any) -> Any:
    """Call a routine without a result at an address; every argument is the address of a value."""
    from numba import types
    from numba.core import cgutils

    signature = types.void(address, arguments)

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        words = cgutils.unpack_tuple(builder, values[1])
        word = words[0].type
        kind = cgutils.ir.FunctionType(cgutils.ir.VoidType(), [word] * len(words))
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), words)
        return context.get_dummy_value()

    return signature, build


@compiled
def gemm(routines, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc):
    """C = alpha op(A) op(B) + beta C, by columns; a, b and c are addresses."""
    i = np.array([m, n, k, lda, ldb, ldc], dtype=np.int32)
    x = np.array([alpha, beta])
    t = np.array([ta, tb], dtype=np.uint8)
    pi, px, pt = i.ctypes.data, x.ctypes.data, t.ctypes.data
    _call(
        routines[0],
        (pt, pt + 1, pi, pi + 4, pi + 8, px, a, pi + 12, b, pi + 16, px + 8, c, pi + 20),
    )
    return i[0] + x[0] + t[0]  # what is pointed at lives until here


@compiled
def trsm(routines, trans, m, n, a, lda, b, ldb):
    """B = op(A)^-1 B for an upper triangle A (m, m), by columns."""
    i = np.array([m, n, lda, ldb], dtype=np.int32)
    x = np.ones(1)
    t = np.array([76, 85, trans, 78], dtype=np.uint8)  # L, U, ., N
    pi, px, pt = i.ctypes.data, x.ctypes.data, t.ctypes.data
    _call(routines[1], (pt, pt + 1, pt + 2, pt + 3, pi, pi + 4, px, a, pi + 8, b, pi + 12))
    return i[0] + x[0] + t[0]


@compiled
def solve(routines, trans, n, m, a, lda, x):
    """X = op(A)^-1 X for an upper triangle A (n, n), by columns, and X (n, m), by rows."""
    i = np.array([n, lda, m], dtype=np.int32)
    one = np.ones(1)
    t = np.array(
        [85, trans, 78, 82, 78 + 84 - trans], dtype=np.uint8
    )  # U, ., N, R, the other of N and T
    pi, px, pt = i.ctypes.data, one.ctypes.data, t.ctypes.data
    if m < 4:
        for c in range(m):
            _call(routines[6], (pt, pt + 1, pt + 2, pi, a, pi + 4, x + 8 * c, pi + 8))
    else:
        # By columns that is X' op(A')^-1.
        _call(routines[1], (pt + 3, pt, pt + 4, pt + 2, pi + 8, pi, px, a, pi + 4, x, pi + 8))
    return i[0] + one[0] + t[0]


@compiled
def symm(routines, m, n, alpha, a, lda, b, ldb, c, ldc):
    """C = alpha B A for symmetric A (n, n), its upper triangle by columns, and B (m, n)."""
    i = np.array([m, n, lda, ldb, ldc], dtype=np.int32)
    x = np.array([alpha, 0.0])
    t = np.array([82, 85], dtype=np.uint8)  # R, U
    pi, px, pt = i.ctypes.data, x.ctypes.data, t.ctypes.data
    _call(
        routines[2],
        (pt, pt + 1, pi, pi + 4, px, a, pi + 8, b, pi + 12, px + 8, c, pi + 16),
    )
    return i[0] + x[0] + t[0]


@compiled
def syrk(routines, n, k, a, lda, c, ldc):
    """The upper triangle of C = A' A, by columns, for A (k, n)."""
    i = np.array([n, k, lda, ldc], dtype=np.int32)
    x = np.array([1.0, 0.0])
    t = np.array([85, 84], dtype=np.uint8)  # U, T
    pi, px, pt = i.ctypes.data, x.ctypes.data, t.ctypes.data
    _call(routines[5], (pt, pt + 1, pi, pi + 4, px, a, pi + 8, px + 8, c, pi + 12))
    return i[0] + x[0] + t[0]


@compiled
def potrf(routines, n, a, lda):
    """Upper Cholesky factor in place, by columns; 0, or the pivot that is not positive."""
    i = np.array([n, lda, 0], dtype=np.int32)
    t = np.array([85], dtype=np.uint8)
    pi, pt = i.ctypes.data, t.ctypes.data
    _call(routines[3], (pt, pi, a, pi + 4, pi + 8))
    return i[2] + 0 * t[0]


@compiled
def potri(routines, n, a, lda):
    """Upper triangle of the inverse from an upper Cholesky factor, in place."""
    i = np.array([n, lda, 0], dtype=np.int32)
    t = np.array([85], dtype=np.uint8)
    pi, pt = i.ctypes.data, t.ctypes.data
    _call(routines[4], (pt, pi, a, pi + 4, pi + 8))
    return i[2] + 0 * t[0]
