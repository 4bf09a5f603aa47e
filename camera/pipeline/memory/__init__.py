"""What a run takes of the system's memory and of a device's, before it starts."""
