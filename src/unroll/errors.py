"""The one error a user should ever see: a single line that names file, place, what was found and what is allowed."""


class UserError(Exception):
    """A mistake in the user's input or surroundings; printed as one line, without a traceback."""
