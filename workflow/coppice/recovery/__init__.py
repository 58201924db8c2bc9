"""Recovery training: schedule, objective, resumable state, trainer, devices."""
