"""Small experiments on real digits: the data, the networks and the training they share."""
