"""What runs the library: one run, a sweep, tables, figures, the tiny default model."""
