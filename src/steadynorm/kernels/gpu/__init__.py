"""The stages on a GPU, in Triton; see backend.py. Triton is imported with the first call."""
