"""The tour: a few minutes of training on real digits that show what the package is for."""
