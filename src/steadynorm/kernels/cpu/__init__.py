"""The CPU kernels, compiled by Numba; numba is imported when the first call asks for them."""
