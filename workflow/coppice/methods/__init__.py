"""Methods: one file each, found by `base.methods`."""
