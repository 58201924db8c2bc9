"""Laws: formulas for what compression costs, fitted to a study's tables; one file a law, found by name.

`contracts` defines what a law is, `options` what all laws have in common, and `registry` finds them. `engine` fits
them, `points` reads their points from the tables, `stage` is the command, and `figure` draws what was fitted.
"""
