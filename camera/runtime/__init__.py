"""The machine: errors, registries, files, processes, threads, memory, progress."""
