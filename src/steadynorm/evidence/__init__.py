"""What shows that the promises hold: the lab, the tour and the benchmark."""
