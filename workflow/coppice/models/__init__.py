"""Models: sources, architectures, checkpoints, stored forms of linears, surgery, rotation and accounting."""
