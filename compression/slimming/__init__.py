"""Expert Slimming: make every expert smaller, keep them all.

Each method is a pure function of a stack of weights and at most one statistic, and knows no model:

    method(weight_EOI, [statistic,] setting) -> weight_EOI, or Quantized(codes_EOI, scale_EOG)

The setting is the part of a step that the mathematics needs (a grid or a pattern). A single matrix is
a stack of one. What happens to an expert does not depend, to the last bit, on who else is in its stack. This
file imports nothing.
"""
