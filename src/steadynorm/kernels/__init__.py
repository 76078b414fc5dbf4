"""Everything sized like the input: two reductions, two maps, and the choice of who runs them."""
