"""The one exception for what a user can cause and mend."""


class CameraError(Exception):
    """A refusal in one sentence: what is wrong, where (key, file, tensor), how to mend it."""
