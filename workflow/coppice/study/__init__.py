"""The study: what the config may say, how it is read, the tree of its nodes, and which results are outdated."""
