"""Where the points of a law come from: measured nodes, recovery runs, choices of benchmark items, or a file."""
