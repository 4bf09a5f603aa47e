"""What is said of a sweep before it starts."""
