"""Methods: one file each, registered by `registry.methods`."""
