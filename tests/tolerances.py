"""Every numeric tolerance of the test suite. Never relax one to make a test pass: find out why it fails."""

# What other people's implementations computed, stored as float32.
GOLDEN_RTOL = 1e-4
GOLDEN_ATOL = 1e-6
GRAD_NORM_RTOL = 5e-4
GRAD_NORM_ATOL_OF_TOTAL = 1e-6
"""Times the total norm: biases in front of a batch norm have gradient zero but for rounding."""

# The same float32 arithmetic in another order.
FLOAT32_RTOL = 1e-5
FLOAT32_ATOL = 1e-6

# Float64 throughout.
FLOAT64_RTOL = 1e-12

# Perlin noise this close to the threshold may round to either side of it.
PERLIN_ATOL = 1e-5

# Sample statistics, in standard errors.
STANDARD_ERRORS = 4.0

# Batch norms folded into a backbone's convolutions: other roundings in each of its layers, of the largest value.
FOLDED_ATOL = 2e-5

# Large products in bfloat16 (8 bits of mantissa) through a backbone and the heads, against float32: of the largest
# absolute value in the map, and of the scores' scale.
BF16_INFERENCE_ATOL = 5e-2

# Gradients of a step whose products were all taken in bfloat16, as a share of the gradient's norm.
BF16_GRADIENT_RTOL = 0.15

# After some optimiser steps on inputs that agree to rounding: AdamW divides a gradient by its size, so that where it is
# nearly zero, rounding decides the step. On one machine the difference is usually none at all.
TRAINED_RTOL = 1e-3

# A batch that workers share, sums over slices and then over workers: losses and metrics, gradients as a share of the
# whole gradient's norm, weights and buffers after some steps along the gradient as a share of the largest value.
SHARED_RTOL = 1e-5
