"""BEiT and BEiT v2 in JAX and Flax.

Shape letters, the same in every docstring:
`B` images, `H W` pixels, `h w` patch grid, `N = h*w` patches, `L = N + 1` tokens with CLS first,
`M` masked patches, `D` width, `K` codes of the vocabulary, `E` code width, `C` classes.
"""
