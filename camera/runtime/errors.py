"""The exception for faults that a user can cause and fix."""


class CameraError(Exception):
    """A refusal in one sentence: what is wrong, where (key, file, tensor), how to fix it."""
