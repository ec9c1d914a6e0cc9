"""Mistakes a user can make, each told in one sentence."""


class StrettoError(ValueError):
    """A setting, file or combination that cannot work; the message says what would."""


class ConflictError(StrettoError):
    """Two requests, or a request and another pack's patch, that cannot share a run."""


class SchemaError(StrettoError):
    """A document of a kind or major version that this release does not read."""
