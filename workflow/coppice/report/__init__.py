"""The report of a study: page, figures, terminal summary, and one node's story."""
