"""Errors whose text is a sentence for the user: what is wrong, where, and what to do."""


class UserError(ValueError):
    """Something that the user can mend; the command line prints its sentence and exits with 1."""
