"""Types and settings of the configuration."""
