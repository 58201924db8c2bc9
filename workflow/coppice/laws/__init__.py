"""Laws: formulas for what compression costs, fitted to a study's tables; one file a law, found by name.

`contracts` says what a law is, `options` what all laws can be told, `registry` finds them. `engine` fits them;
`points` finds their points in the tables; `stage` is the command, and `figure` draws what it fitted.
"""
