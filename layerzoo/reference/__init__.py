"""The ops in plain PyTorch: the oracle of the tests, the fallback without kernels, and the maths written out."""
