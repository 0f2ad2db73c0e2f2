"""BLAS and LAPACK, as SciPy brings them, for compiled code.

Their addresses are arguments of the compiled functions and not constants of them, so that what
numba compiled once can be kept on disk for the next process. A call is written where it stands, its
arguments on the stack: a function around each would take a fifth of the time of compiling.
"""

from __future__ import annotations

import ctypes
from importlib import import_module
from typing import Any

from openreml_nn.support.compilation import Compiled, inlined

__all__ = ["ROUTINES", "gemm", "potrf", "potri", "symm", "syrk", "trsm", "trsv"]

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
ROUTINES = tuple(_address(*name) for name in _NAMES)


def _routine(name: str, kinds: str) -> Compiled:
    """A routine, called as ``routine(ROUTINES, arguments)`` with a tuple; it gives its last argument
    but addresses, what LAPACK says of success, and 0 where that is none.

    Args:
        name: in BLAS or LAPACK.
        kinds: of each argument: c is a character, i an integer, d a number, a an address, and o an
            integer that the routine sets, which is not given.
    """
    place = [each for _, each in _NAMES].index(name)

    def call(context: Any, routines: Any, arguments: Any) -> Any:
        from numba import types
        from numba.core import cgutils

        signature = types.int64(routines, arguments)
        stored = {"c": types.uint8, "i": types.int32, "d": types.float64, "o": types.int32}

        def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            given = iter(zip(cgutils.unpack_tuple(builder, values[1]), arguments, strict=True))
            word, pointers, found = context.get_value_type(types.intp), [], None
            for kind in kinds:
                value, of = (word(0), types.intp) if kind == "o" else next(given)
                if kind == "a":
                    pointers.append(context.cast(builder, value, of, types.intp))
                    continue
                number = context.cast(builder, value, of, stored[kind])
                slot = cgutils.alloca_once_value(builder, number)
                pointers.append(builder.ptrtoint(slot, word))
                found = slot if kind == "o" else found
            form = cgutils.ir.FunctionType(cgutils.ir.VoidType(), [word] * len(pointers))
            address = builder.extract_value(values[0], place)
            builder.call(builder.inttoptr(address, form.as_pointer()), pointers)
            return word(0) if found is None else builder.sext(builder.load(found), word)

        return signature, build

    return inlined(call)


#: C = alpha op(A) op(B) + beta C: ta, tb, m, n, k, alpha, A, lda, B, ldb, beta, C, ldc.
gemm = _routine("dgemm", "cciiidaiaidai")
#: B = alpha op(A)^-1 B, or B op(A)^-1: side, uplo, ta, diag, m, n, alpha, A, lda, B, ldb.
trsm = _routine("dtrsm", "cccciidaiai")
#: x = op(A)^-1 x: uplo, ta, diag, n, A, lda, x, step.
trsv = _routine("dtrsv", "ccciaiai")
#: C = alpha A B + beta C, or B A, for symmetric A: side, uplo, m, n, alpha, A, lda, B, ldb, beta, C, ldc.
symm = _routine("dsymm", "cciidaiaidai")
#: A triangle of C = alpha A' A + beta C: uplo, ta, n, k, alpha, A, lda, beta, C, ldc.
syrk = _routine("dsyrk", "cciidaidai")
#: A Cholesky factor in place: uplo, n, A, lda; 0, or the pivot that is not positive.
potrf = _routine("dpotrf", "ciaio")
#: A triangle of the inverse from a Cholesky factor, in place: uplo, n, A, lda.
potri = _routine("dpotri", "ciaio")
