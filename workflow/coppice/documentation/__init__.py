"""What is generated from the code, one page a file; `python -m coppice.documentation` writes them."""
