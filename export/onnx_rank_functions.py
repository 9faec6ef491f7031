"""The rank of attention as ONNX functions, since ONNX has no singular values.

Of the raters' attention P, [t, v], the rank is the number of singular values above
``tolerance = largest * max(t, v) * 2^-23``: the number of eigenvalues of
``P P^T - tolerance^2 I`` above zero. By Sylvester's law of inertia that is the number
of positive pivots of its elimination, in any order; the largest come first. In double
precision, since the tolerance is squared. The largest singular value is found by
iteration: P has no negative entries, so a vector of ones is never far from its vector.
"""

# mypy: ignore-errors
# These functions are ONNX in Python's syntax, not Python.

from __future__ import annotations

from onnxscript import DOUBLE, FLOAT, INT64, script
from onnxscript import opset20 as op
from onnxscript.values import Opset

_DOMAIN = "vtprune"


@script(Opset(_DOMAIN, 1), default_opset=op)
def Largest(gram: DOUBLE[...]) -> DOUBLE:  # noqa: N802 - as ONNX names
    """The largest eigenvalue of a matrix without negative entries."""
    found = op.ReduceSum(gram, op.Constant(value_ints=[1]), keepdims=1)
    for _ in range(64):  # few digits of it are needed
        length = op.ReduceL2(found, keepdims=1)
        found = op.MatMul(gram, found / length)
    return op.ReduceL2(found, keepdims=0)


@script(Opset(_DOMAIN, 1), default_opset=op)
def Positive(matrix: DOUBLE[...]) -> INT64:  # noqa: N802 - as ONNX names
    """How many eigenvalues of a symmetric matrix are above zero."""
    size = op.Squeeze(op.Shape(matrix, start=0, end=1))
    zero = op.Cast(op.Constant(value_float=0.0), to=11)
    same = op.EyeLike(matrix)
    left = op.Identity(matrix)
    count = op.Constant(value_int=0)
    for _ in range(size):
        diagonal = op.ReduceSum(left * same, op.Constant(value_ints=[1]), keepdims=0)
        place = op.ArgMax(op.Abs(diagonal), keepdims=1)
        pivot = op.Gather(diagonal, place)
        column = op.Gather(left, place, axis=1)
        count = count + op.Squeeze(op.Cast(pivot > zero, to=7))
        other = op.Gather(op.Constant(value_int=1) - op.Cast(same, to=7), place, axis=1)
        rest = op.Cast(op.MatMul(other, op.Transpose(other, perm=[1, 0])), to=11)
        outer = op.MatMul(column, op.Transpose(column, perm=[1, 0]))
        left = (left - outer / pivot) * rest
    return count


@script(Opset(_DOMAIN, 1), default_opset=op)
def AttentionRank(attended: FLOAT[...], roles: INT64[...]) -> INT64:  # noqa: N802 - as ONNX names
    """As ``attention_rank.attention_rank``; visual tokens have role 1, raters 2."""
    kinds = op.Reshape(roles, op.Constant(value_ints=[-1]))
    pairs = op.Squeeze(attended, op.Constant(value_ints=[0]))
    rows = op.Compress(pairs, kinds == op.Constant(value_int=2), axis=0)
    rated = op.Compress(rows, kinds == op.Constant(value_int=1), axis=1)
    exact = op.Cast(rated, to=11)
    gram = op.MatMul(exact, op.Transpose(exact, perm=[1, 0]))
    largest = Largest(gram)
    size = op.ReduceMax(op.Shape(rated), keepdims=0)
    step = op.Cast(op.Constant(value_float=2.0**-23), to=11)
    tolerance = op.Cast(size, to=11) * step
    same = op.EyeLike(gram)
    return Positive(gram - largest * tolerance * tolerance * same)


FUNCTIONS = (AttentionRank, Largest, Positive)
