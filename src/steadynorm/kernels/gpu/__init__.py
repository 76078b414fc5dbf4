"""The stages on a GPU, in Triton; see backend.py. What imports triton is loaded with the first call."""
