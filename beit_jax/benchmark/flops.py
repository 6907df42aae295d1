"""Floating-point operations of a program's matrix products, counted from what was traced."""

import math
from collections.abc import Callable, Iterator

import jax


def matrix_flops(fn: Callable, *args) -> int:
    """FLOPs of all matrix products and convolutions of `fn(*args)`, two for a multiply-add.

    They are counted as traced, before any compiler: what model FLOPs mean for MFU (Chowdhery et al.
    2022, appendix B), for a program without rematerialisation.

    Args:
      fn: a traceable function without loops of unknown length around matrix products.
      args: its arguments, as arrays or as shapes.
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        output = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * output * math.prod(left[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * output * math.prod(kernel) // outputs
        else:
            turns = params["length"] if name == "scan" else 1
            total += turns * sum(map(_count, _inner(params)))
    return total


def _inner(params: dict) -> Iterator:
    """The programs that an operation's parameters hold."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item
