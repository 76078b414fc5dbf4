"""Speed against peers and against the machine's own copy, in one interleaved run."""
